"""Which files of a folder make a model: tried with the file names of published models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.dynamic_module_utils import get_relative_import_files

from dapa_merge.checkpoint.contents import (
    code_elsewhere,
    code_files,
    is_licence,
    is_settings,
    left_behind,
    parts_of,
    refuse_other_weights,
)
from dapa_merge.checkpoint.folder import Layout, is_clutter
from dapa_merge.errors import CheckpointError

# Names as published repositories have them: what a copy needs, and what it can do without (weights are told apart by
# `find_weights`, code by what the settings name).
PUBLISHED = {
    "Llama 3.1": (
        "config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json LICENSE "
        "USE_POLICY.md",
        "README.md .gitattributes original/params.json original/tokenizer.model original/consolidated.00.pth",
    ),
    "Llama 3.2 Vision": (
        "config.json chat_template.json preprocessor_config.json LICENSE.txt USE_POLICY.md",
        "original/params.json",
    ),
    "Llama 2": ("tokenizer.model LICENSE.txt USE_POLICY.md", "Responsible-Use-Guide.pdf pytorch_model.bin.index.json"),
    "Mistral Small 3.2": (
        "SYSTEM_PROMPT.txt config.json generation_config.json params.json tekken.json preprocessor_config.json "
        "processor_config.json chat_template.jinja",
        "consolidated.safetensors",
    ),
    "Mistral 7B v0.3": ("params.json tokenizer.model tokenizer.model.v3 tokenizer_config.json", "README.md"),
    "Qwen2.5": ("LICENSE vocab.json merges.txt tokenizer.json tokenizer_config.json generation_config.json", ""),
    "Qwen3-VL": (
        "chat_template.json preprocessor_config.json video_preprocessor_config.json vocab.json merges.txt",
        "assets/demo.jpeg",
    ),
    "Qwen 1": ("LICENSE NOTICE qwen.tiktoken tokenizer_config.json", "SimSun.ttf examples/react_prompt.md"),
    "Gemma 3": (
        "added_tokens.json chat_template.json chat_template.jinja preprocessor_config.json processor_config.json "
        "tokenizer.model special_tokens_map.json",
        "README.md",
    ),
    "Phi-3": (
        "LICENSE NOTICE.md added_tokens.json tokenizer.model",
        "CODE_OF_CONDUCT.md SECURITY.md sample_finetune.py",
    ),
    "DeepSeek V3": ("LICENSE-CODE LICENSE-MODEL", "README_WEIGHTS.md figures/benchmark.png inference/model.py"),
    "ChatGLM": ("MODEL_LICENSE ice_text.model tokenizer.model", "pytorch_model.bin"),
    "Baichuan 2": ("Community_License_for_Baichuan2_Model.pdf tokenizer.model", "README.md"),
    "RWKV": ("rwkv_vocab_v20230424.txt", ""),
    "Kimi": ("tiktoken.model chat_template.jinja LICENSE.md THIRD_PARTY_NOTICES.md", "docs/deploy.md"),
    "Hermes": ("additional_chat_templates/tool_use.jinja", "additional_chat_templates/notes.md templates/x.jinja"),
    "Cohere": ("tokenizer.json special_tokens_map.json", "tokenizer_training.log"),
    "GPT-2": ("merges.txt vocab.json", "64.tflite rust_model.ot onnx/decoder/model.onnx tf_model.h5"),
    "ModelScope": ("configuration.json", ""),
    "sentence-transformers": (
        "config.json tokenizer.json",
        "modules.json 1_Pooling/config.json config_sentence_transformers.json sentence_bert_config.json",
    ),
    "a trainer": (
        "",
        "training_args.bin optimizer.pt scheduler.pt rng_state.pth trainer_state.json all_results.json train.jsonl "
        "eval_results.json train_results.json train.log wandb.yaml checkpoint-100/config.json runs/events.out "
        "adapter_config.json axolotl_config.yml trainer_log.jsonl latest zero_to_fp32.py global_step100/rank.pt",
    ),
    "a careless user": (
        "",
        "id_rsa .env .git/config token secrets.json credentials.json license_key.txt LICENSE.key notices.json "
        "service_account.json upload.py requirements.txt model.safetensors.bak config.json.bak notes.txt",
    ),
    "desktops": (
        "",
        "._config.json ._tokenizer.json .DS_Store desktop.ini Thumbs.db __MACOSX/config.json "
        ".ipynb_checkpoints/config.json config.json~ #config.json# ~$config.json Icon\r",
    ),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_of_published_models_what_makes_them_is_kept_and_nothing_else(model):
    kept, left = (text.split(" ") if text else [] for text in PUBLISHED[model])
    assert [name for name in kept if not (is_settings(name) or is_licence(name))] == []
    assert [name for name in left if is_settings(name) or is_licence(name)] == []


def test_every_settings_file_that_transformers_knows_is_kept():
    """Read from its source, since importing all of its tokenizers takes long."""
    root = Path(transformers.__file__).parent
    tables = [
        table
        for path in (*root.glob("models/*/tokenization_*.py"), *root.glob("tokenization_*.py"))
        for table in re.findall(r"VOCAB_FILES_NAMES\s*=\s*\{(.*?)\}", path.read_text(encoding="utf-8"), re.DOTALL)
    ]
    names = {name for table in tables for name in re.findall(r':\s*"([^"]+)"', table)}
    names |= {*re.findall(r'_NAME = "([^"]+)"', (root / "utils" / "__init__.py").read_text(encoding="utf-8"))}
    assert len(names) > 20
    of_weights = {name for name in names if name.startswith(("model.", "pytorch_model."))}
    of_encoders = {"prophetnet.tokenizer", "word_shape.json", "word_pronunciation.json"}
    assert {name for name in names if not is_settings(name)} <= of_weights | of_encoders | {"modelcard.json"}


@pytest.mark.parametrize("name", ["Tongyi Qianwen LICENSE AGREEMENT", "Community License for Baichuan2 Model.pdf"])
def test_terms_may_have_blanks_in_their_name(name):
    assert is_licence(name)


def write(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_code_is_what_the_settings_name_and_what_that_imports(tmp_path):
    """Compared with transformers' own search, which follows relative imports from one file."""
    folder = write(
        tmp_path,
        config__json={"auto_map": {"AutoModel": "modeling_x.X", "AutoConfig": "a/b--configuration_y.Y"}},
        tokenizer_config__json={"auto_map": {"AutoTokenizer": ["tokenization_x.T", None]}},
        modeling_x__py="import torch\nfrom .layers import A\nfrom . import extra\ndef f():\n    from .late import g\n",
        layers__py="from .deep import z\n",
        deep__py="", late__py="", extra__py="", tokenization_x__py="",
        configuration_y__py="", train__py="", upload__py="",
    )  # fmt: skip
    found = code_files(folder)
    assert found == ["deep.py", "extra.py", "late.py", "layers.py", "modeling_x.py", "tokenization_x.py"]
    assert {Path(path).name for path in get_relative_import_files(folder / "modeling_x.py")} <= set(found)
    assert code_elsewhere(folder) == ["a/b"]
    assert left_behind(folder, parts_of(folder)) == ["configuration_y.py", "train.py", "upload.py"]


@pytest.mark.parametrize("named", ["../secret.X", "/etc/x.Y", "a.b.C", "", "x", "--.X", 3, None, {"a": 1}, [["x.Y"]]])
def test_no_config_names_a_file_outside_of_its_folder(tmp_path, named):
    (tmp_path / "secret.py").write_text("")
    (tmp_path / "model").mkdir()
    write(tmp_path / "model", config__json={"auto_map": {"AutoModel": named}, "custom_pipelines": named})
    assert code_files(tmp_path / "model") == []


def test_code_that_is_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "secret.py").write_text("")
    (tmp_path / "model").mkdir()
    write(tmp_path / "model", config__json={"auto_map": {"AutoModel": "x.X"}})
    (tmp_path / "model" / "x.py").symlink_to("../secret.py")
    with pytest.raises(CheckpointError, match=r"x\.py is a link that leads out of its folder"):
        parts_of(tmp_path / "model")


LAYOUT = Layout(index="model.safetensors.index.json")
ELSEWHERE = {
    "transformers_weights": ({"transformers_weights": "other.safetensors"}, "other.safetensors"),
    "of a tower": ({"text_config": {"transformers_weights": "x"}}, "text_config.transformers_weights"),
    "no text": ({"transformers_weights": ["a"]}, "transformers_weights"),
    "configuration_files": ({"configuration_files": ["config.4.0.0.json"]}, "config.4.0.0.json"),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_a_config_that_leads_to_other_weights_is_refused_by_its_key(case):
    config, named = ELSEWHERE[case]
    with pytest.raises(CheckpointError, match=named):
        refuse_other_weights(config, LAYOUT, "m")


@pytest.mark.parametrize("config", [{}, {"transformers_weights": None}, {"transformers_weights": LAYOUT.index}])
def test_a_config_that_leads_to_the_same_weights_passes_where_others_do_not(config):
    refuse_other_weights(config, LAYOUT, "m")
    with pytest.raises(CheckpointError, match="transformers_weights"):
        refuse_other_weights({**config, "transformers_weights": "other.safetensors"}, LAYOUT, "m")


@given(st.text(min_size=1).filter(lambda name: name.strip("./")))
def test_a_name_is_at_most_one_thing(name):
    if is_clutter(name):
        assert not is_settings(name)
        assert not is_licence(name)
