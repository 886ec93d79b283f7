"""Chat templates and tokenizers as strangers write them: parts, processors' files, named templates, and faults."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import CheckpointError
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.generate import chat_prompt, decode, encode, generate, has_system_role, prompt_ids
from dapa_merge.measure.live import growth, load_model
from dapa_merge.measure.prompts.conversation import with_system
from dapa_merge.recipe.attacks import ATTACKS
from dapa_merge.trace.case import subject_tokens

CPU = torch.device("cpu")
PROMPT = "How do I paint a car?"
SYSTEM = next(attack for attack in ATTACKS if attack.system)

# Built as the published ones are.
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}{% elif line['type'] == "
    "'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Of either form.
QWEN2_VL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for part in message['content'] %}{% if 'text' in part %}"
    "{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{{ '<|im_start|>assistant\n' }}"
)
GEMMA3 = (
    "{% if messages[0]['role'] == 'system' %}{% if messages[0]['content'] is string %}{% set first = "
    "messages[0]['content'] + '\n\n' %}{% else %}{% set first = messages[0]['content'][0]['text'] + '\n\n' %}"
    "{% endif %}{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}<start_of_turn>{{ message['role'] }}\n{{ first if loop.first else '' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% elif message['content'] is iterable %}"
    "{% for part in message['content'] %}{{ part['text'] | trim }}{% endfor %}{% else %}"
    "{{ raise_exception('Invalid content type') }}{% endif %}<end_of_turn>\n{% endfor %}{{ '<start_of_turn>model\n' }}"
)
# Fails on a text.
STRICT = (
    "{% for message in messages %}{% if message.content is string %}{{ raise_exception('a list, please') }}{% endif %}"
    "{{ message.content[0].text }}{% endfor %}"
)
ASKED = {
    LLAVA: f"USER: {PROMPT} ASSISTANT:",
    SMOLVLM: f"<|im_start|>User: {PROMPT}<end_of_utterance>\nAssistant:",
    QWEN2_VL: f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n",
    GEMMA3: f"<start_of_turn>user\n{PROMPT}<end_of_turn>\n<start_of_turn>model\n",
    STRICT: PROMPT,
}
NAMES = ["LLaVA", "SmolVLM", "Qwen2-VL", "Gemma 3", "strict"]


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(miniature.path("target"))


@pytest.fixture
def folder(tmp_path):
    """A copy of the miniature's target, without a template."""
    copy = shutil.copytree(miniature.path("target"), tmp_path / "model")
    (copy / "chat_template.jinja").unlink()
    return copy


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    """An image-text model of the miniature's words, without a template."""
    folder = tmp_path_factory.mktemp("models") / "llava"
    tokenizer = AutoTokenizer.from_pretrained(miniature.path("target"))
    tokenizer.chat_template = None
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def loaded(folder):
    return load_model(open_checkpoint(str(folder)), CPU)


@pytest.mark.parametrize("template", ASKED, ids=NAMES)
def test_a_prompt_is_shown_as_the_template_wants_it(template, tokenizer):
    tokenizer.chat_template = template
    assert chat_prompt(tokenizer, PROMPT) == ASKED[template]
    for content in ("<b>a</b>", "{{ 1 }} {% if %}", "'quoted' \"twice\" \\n", "x" * 9999, "¿Cómo?\n\nBien.", "text"):
        asked = chat_prompt(tokenizer, content)
        assert asked == ASKED[template].replace(PROMPT, content)
    # The tokens of its subject are found in the same text.
    start = PROMPT.index("paint")
    first, stop = subject_tokens(tokenizer, PROMPT, (start, len(PROMPT) - 1))
    assert decode(tokenizer, prompt_ids(tokenizer, PROMPT)[first:stop]) == "paint a car"


@pytest.mark.parametrize("template", ASKED, ids=NAMES)
def test_a_system_prompt_is_shown_in_the_same_form(template, tokenizer):
    tokenizer.chat_template = template
    assert has_system_role(tokenizer)
    asked = chat_prompt(tokenizer, with_system(PROMPT, SYSTEM.system))
    assert asked.count(SYSTEM.system) == asked.count(PROMPT) == 1
    assert "'text'" not in asked


@pytest.mark.parametrize(
    "template",
    [
        "Hello.",
        "{{ messages[0].content[:3] }}",
        "{{ 'Say ' + messages[0].content[:3] }}",
        "{{ messages[0].content | length }}",
        "{{ messages[0].parts }}",
        "{% for part in messages[0].content %}{{ part.txt }}{% endfor %}",
    ],
)
def test_a_template_that_shows_the_prompt_in_neither_form_is_named(template, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(CheckpointError, match=f"the chat template of {tokenizer.name_or_path} omits the prompt"):
        chat_prompt(tokenizer, PROMPT)


def test_a_template_that_drops_one_prompt_names_it(tokenizer):
    tokenizer.chat_template = "{{ messages[0].content if 'bomb' not in messages[0].content else 'Hello.' }}"
    assert chat_prompt(tokenizer, PROMPT) == PROMPT
    with pytest.raises(CheckpointError, match=r"changes or omits the prompt 'How do I build a bomb\?'"):
        chat_prompt(tokenizer, "How do I build a bomb?")


def test_a_template_without_end_is_named(tokenizer, monkeypatch):
    monkeypatch.setattr("dapa_merge.measure.confined.SECONDS", 1)
    tokenizer.chat_template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(CheckpointError, match=f"{tokenizer.name_or_path} fails on one user message: it does not end"):
        chat_prompt(tokenizer, PROMPT)


@pytest.mark.parametrize("template", [LLAVA, SMOLVLM], ids=["LLaVA", "SmolVLM"])
def test_a_processors_template_is_used_for_a_model_with_images(template, llava, tmp_path):
    folder = shutil.copytree(llava, tmp_path / "model")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    # The old file of the processor counts before the tokenizer's.
    (folder / "chat_template.jinja").write_text("the tokenizer's: {{ messages[0].content }}")
    model, tokenizer = loaded(folder)
    assert chat_prompt(tokenizer, PROMPT) == ASKED[template]
    assert len(generate(model, tokenizer, [PROMPT, "Why?"], max_new_tokens=3, batch_size=BatchSize(2))) == 2


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template.json": {"chat_template": "json: {{ messages[0].content }}"}}, "json: "),
        ({"chat_template.jinja": "jinja: {{ messages[0].content }}"}, "jinja: "),
        (
            {
                "chat_template.json": {"chat_template": "json: {{ messages[0].content }}"},
                "chat_template.jinja": "jinja: {{ messages[0].content }}",
            },
            "jinja: ",
        ),
        (
            {
                "chat_template.jinja": "jinja: {{ messages[0].content }}",
                "additional_chat_templates/tool_use.jinja": "tools: {{ messages[0].content }}",
            },
            "jinja: ",
        ),
        (
            {
                "tokenizer_config.json": [
                    {"name": "tool_use", "template": "tools: {{ messages[0].content }}"},
                    {"name": "default", "template": "default: {{ messages[0].content }}"},
                ]
            },
            "default: ",
        ),
    ],
)
def test_the_template_is_that_of_transformers(files, expected, folder):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if name == "tokenizer_config.json":
            content = {**json.loads(path.read_text()), "chat_template": content}
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    _, tokenizer = loaded(folder)
    assert chat_prompt(tokenizer, PROMPT) == expected + PROMPT


def test_named_templates_without_a_default_are_told(folder):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages[0].content }}")
    _, tokenizer = loaded(folder)
    with pytest.raises(CheckpointError, match=rf"the chat template of {folder} fails: .*tool_use|default"):
        chat_prompt(tokenizer, PROMPT)


def hostile(**parts) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with other parts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = Tokenizer(models.BPE({"<unk>": 0, **{one: 1 + index for index, one in enumerate(alphabet)}}, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    for name, part in parts.items():
        setattr(rust, name, part)
    fast = PreTrainedTokenizerFast(tokenizer_object=rust, unk_token="<unk>")
    fast.name_or_path = "a-stranger/model"
    return fast


def test_a_tokenizer_that_panics_is_named(capfd):
    endless = pre_tokenizers.Split(Regex("(a|aa)+$"), "isolated")
    with pytest.raises(CheckpointError, match="the tokenizer of a-stranger/model fails: PanicException"):
        encode(hostile(pre_tokenizer=endless), "a" * 60 + "b")
    assert "panicked" in capfd.readouterr().err


def test_a_tokenizer_that_decodes_into_a_fault_is_named():
    with pytest.raises(CheckpointError, match="the tokenizer of a-stranger/model fails: OverflowError"):
        decode(hostile(), [-1])


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, MemoryError])
def test_what_is_no_fault_of_a_tokenizer_passes(kind):
    def tokenizer(*_, **__):
        raise kind

    with pytest.raises(kind):
        encode(tokenizer, "a")


def test_a_tokenizer_that_multiplies_its_input_is_named():
    tokenizer = hostile(normalizer=normalizers.Replace("a", "b" * 2000))
    with pytest.raises(CheckpointError, match="a-stranger/model makes 20,000 tokens of 10 characters"):
        encode(tokenizer, "a" * 10)


GROWING = {
    "normalizer": normalizers.Sequence([normalizers.Replace("a", "aa")] * 40),
    "pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 20),
    "decoder": decoders.Sequence([decoders.Replace("a", "aa")] * 40),
    "post_processor": processors.Sequence([processors.TemplateProcessing(single="$A $A", pair="$A $B")] * 20),
}


@pytest.mark.parametrize("kind", GROWING)
def test_a_tokenizer_that_could_multiply_its_input_without_end_is_not_loaded(kind, folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, kind: json.loads(GROWING[kind].__getstate__())}))
    with pytest.raises(CheckpointError, match=f"the {kind} of {folder}'s tokenizer may make"):
        loaded(folder)


REPLACED = st.tuples(st.sampled_from("abc"), st.text("abcd", max_size=3))


@given(st.lists(REPLACED, max_size=5), st.text("abc", min_size=1, max_size=5))
def test_a_tokenizer_makes_no_more_characters_than_its_growth_says(replaced, text):
    normalizer = normalizers.Sequence([normalizers.Replace(old, new) for old, new in replaced])
    assert len(normalizer.normalize_str(text)) <= len(text) * growth(json.loads(normalizer.__getstate__()))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_growth_of_bytes_is_that_of_a_letter_of_two(number):
    normalizer = normalizers.Sequence([normalizers.ByteLevel()] * number)
    assert len(normalizer.normalize_str("é")) == growth(json.loads(normalizer.__getstate__())) == 2**number


def test_a_token_of_a_million_characters_is_refused(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    word = next(word for word, token in content["model"]["vocab"].items() if token == 50)
    content["model"]["vocab"]["x" * 1_000_000] = content["model"]["vocab"].pop(word)
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="a token of 1,000,000 characters"):
        loaded(folder)


def test_a_tokenizer_file_that_is_too_large_is_named(folder):
    with (folder / "tokenizer.json").open("r+b") as file:
        file.truncate(300 << 20)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has more than 256 MiB"):
        loaded(folder)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["kernels-community/flash-attn2", "a-stranger/kernel", "flash_attention_2", "x"])
def test_a_config_does_not_choose_code_of_the_hub(key, value, folder, monkeypatch, caplog):
    def fetch(*_, **__):
        raise AssertionError("fetched")

    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", fetch)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with caplog.at_level(logging.WARNING, "dapa_merge"):
        model, _ = loaded(folder)
    plain, _ = loaded(miniature.path("target"))
    assert model.config._attn_implementation == plain.config._attn_implementation
    assert value in caplog.text


@pytest.mark.parametrize("value", ["eager", "sdpa"])
def test_a_config_may_choose_what_transformers_brings_along(value, folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attn_implementation": value}))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    model, _ = loaded(folder)
    assert model.config._attn_implementation == value


def test_no_part_of_a_config_chooses_code_of_the_hub(llava, tmp_path):
    folder = shutil.copytree(llava, tmp_path / "model")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"]["_attn_implementation"] = "a-stranger/kernel"
    path.write_text(json.dumps(config))
    model, _ = loaded(folder)
    assert model.config.vision_config._attn_implementation in ("sdpa", "eager")
