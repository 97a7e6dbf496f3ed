"""Which tokens end a response, by the chat template, the files of the model and the config."""

import json

import pytest
from fake_models import CHATML, SPEAKING, random_params, write_model, write_tokenizer

from xpo_jax.models.hf import end_tokens, model_folder
from xpo_jax.models.hf.end_tokens import describe_end_tokens, end_token_ids, pad_token_id, turn_end_id

ENDOFTEXT, IM_START, IM_END = 256, 257, 258
SAYS = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"  # no special token anywhere
)
LLAMA = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
THINKS = CHATML.replace("message['content']", "'<think></think>' + message['content'] + '\n'")
REFUSES = "{{ raise_exception('no assistant, please') }}"


@pytest.fixture
def folder(tmp_path):
    return write_model(tmp_path / "model")


@pytest.fixture
def tokenizer(folder):
    """Return the tokenizer of a base model: its end token is <|endoftext|>, however its chat template ends a turn."""
    tokenizer = model_folder.load_tokenizer(folder, SPEAKING)
    tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


def state(folder, **fields):
    (folder / "generation_config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("template", "expected"),
    [(CHATML, IM_END), (LLAMA, ENDOFTEXT), (THINKS, IM_END), (SAYS, None), (REFUSES, None), (None, None)],
)
def test_turn_end_is_what_follows_a_rendered_answer(tokenizer, template, expected):
    tokenizer.chat_template = template
    assert turn_end_id(tokenizer) == expected


def test_end_tokens_of_a_base_model_with_a_chat_template_are_the_templates_too(folder, tokenizer):
    """The files of Qwen2.5's base models name only <|endoftext|>, but a turn ends with <|im_end|>."""
    state(folder, eos_token_id=ENDOFTEXT)
    assert end_token_ids(folder, tokenizer) == (IM_END, ENDOFTEXT)
    described = describe_end_tokens(folder, tokenizer)
    assert described.startswith("<|im_end|>, <|endoftext|>; the first is the chat template's")
    state(folder, eos_token_id=[ENDOFTEXT, IM_END])
    assert end_token_ids(folder, tokenizer) == (IM_END, ENDOFTEXT)
    assert describe_end_tokens(folder, tokenizer) == "<|im_end|>, <|endoftext|>"


def test_end_tokens_of_the_config_replace_all_others(folder, tokenizer):
    names = ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert end_token_ids(folder, tokenizer, names) == (IM_START, IM_END)
    assert describe_end_tokens(folder, tokenizer, names) == "<|im_start|>, <|im_end|> (sampling.end_tokens)"
    for wrong in ([], ["<|eot_id|>"]):
        with pytest.raises(ValueError, match="^sampling.end_tokens: .*token") as caught:
            end_token_ids(folder, tokenizer, wrong)
        assert "\n" not in str(caught.value)


def test_end_and_pad_tokens_of_the_files(folder, tokenizer):
    tokenizer.chat_template, tokenizer.eos_token = None, "<|im_end|>"
    path = folder / "config.json"
    (folder / "generation_config.json").unlink()
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 256}))
    assert end_token_ids(folder, tokenizer) == (256, 258)  # config.json's, and the tokenizer's own
    state(folder, eos_token_id=[258, 256])
    assert end_token_ids(folder, tokenizer) == (258, 256)
    state(folder, eos_token_id=257)
    assert end_token_ids(folder, tokenizer) == (257, 258)
    assert pad_token_id(folder, tokenizer) == 256
    tokenizer.pad_token = None
    assert pad_token_id(folder, tokenizer) == 257
    state(folder, eos_token_id=257, pad_token_id=3)
    assert pad_token_id(folder, tokenizer) == 3
    for wrong in (259, -1, "258", True):
        state(folder, eos_token_id=[258, wrong])
        with pytest.raises(ValueError, match=f"eos_token_id {wrong!r} is not one of the tokenizer's 259"):
            end_token_ids(folder, tokenizer)
    state(folder)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no eos_token_id, .*sampling.end_tokens"):
        end_token_ids(folder, tokenizer)


def test_save_writes_what_the_policy_was_trained_with(folder, tmp_path):
    state(folder, eos_token_id=ENDOFTEXT, transformers_version="4.0", top_k=20)
    params = random_params(0, SPEAKING)
    model_folder.save(tmp_path / "unchanged", params, SPEAKING, folder)
    assert (tmp_path / "unchanged" / "generation_config.json").read_bytes() == (
        folder / "generation_config.json"
    ).read_bytes()
    fields = {"eos_token_id": [IM_END, ENDOFTEXT], "top_k": 0}
    model_folder.save(tmp_path / "trained", params, SPEAKING, folder, generation=fields)
    written = json.loads((tmp_path / "trained" / "generation_config.json").read_text())
    assert written == {"eos_token_id": [IM_END, ENDOFTEXT], "transformers_version": "4.0", "top_k": 0}
    exported = model_folder.load_tokenizer(tmp_path / "trained", SPEAKING)
    assert end_tokens.end_token_ids(tmp_path / "trained", exported) == (IM_END, ENDOFTEXT)


def test_tokenizer_without_a_template_has_no_turns(tmp_path):
    folder = write_tokenizer(tmp_path, chat_template=None)
    from transformers import AutoTokenizer

    assert turn_end_id(AutoTokenizer.from_pretrained(folder)) is None
