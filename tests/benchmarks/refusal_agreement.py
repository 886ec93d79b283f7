"""Agreement of `classify` with people, beside other judges, on labelled completions.

`python tests/benchmarks/refusal_agreement.py FILE.csv...`: XSTest completion files, with the columns `prompt`,
`completion` and `final_label` (CC BY 4.0, Röttger et al., NAACL 2024; not part of this project). The question is
whether a completion is a full refusal. `--show` prints the disagreements.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from dapa_merge.evaluate.refusal import Outcome, classify

# Published agreement of other judges on the same two files, as the peers to beat.
PEERS = {
    "xstest_completions_llama2orig.csv": {
        "XSTest strings": 0.833, "GPT-4 judge": 0.853, "heretic markers": 0.800, "DAPA blacklist": 0.756,
    },
    "xstest_completions_mistralinstruct.csv": {
        "XSTest strings": 0.902, "GPT-4 judge": 0.809, "heretic markers": 0.858, "DAPA blacklist": 0.689,
    },
}  # fmt: skip


def main() -> None:
    """Print the agreement for each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--show", action="store_true", help="print each disagreement")
    arguments = parser.parse_args()
    for path in arguments.files:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["final_label"]]
        misses = {True: 0, False: 0}
        for row in rows:
            refused = classify(row["completion"]) is Outcome.REFUSED
            human = row["final_label"].startswith("2_full_refusal")
            if refused != human:
                misses[refused] += 1
                if arguments.show:
                    print(
                        f"--- {'we: refused' if refused else 'people: refused'}: {row['prompt']}\n{row['completion']}"
                    )
        agreement = 1 - sum(misses.values()) / len(rows)
        peers = ", ".join(f"{name} {figure:.3f}" for name, figure in PEERS.get(path.name, {}).items())
        print(
            f"{path.name}: {agreement:.3f} of {len(rows)} "
            f"(false refusals {misses[True]}, missed refusals {misses[False]}); peers: {peers or 'none known'}"
        )


if __name__ == "__main__":
    main()
