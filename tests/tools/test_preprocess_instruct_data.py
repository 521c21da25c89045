from __future__ import annotations

import errno
import itertools
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron.data import unfinished
from megatron.data.indexed import IndexedDataset
from megatron.errors import ConfigError, DataError
from megatron.tokenizer import TokenizerConfig, build_tokenizer
from tiny_tokenizers import write_huggingface

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "tests" / "data" / "samples" / "instruct"
MODEL = SAMPLES / "spm_bpe_1024.model"
CONTROLS = "<|im_start|>,<|im_end|>"
# The line of the samples whose texts spell out control tokens.
INJECTED = 4


@pytest.fixture
def preprocess(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Runs the tool in this process and returns what it prints to both streams."""
    main = runpy.run_path(str(ROOT / "tools" / "preprocess_instruct_data.py"))["main"]

    def run(*arguments: object) -> tuple[str, str]:
        main([str(argument) for argument in arguments])
        return capsys.readouterr()

    return run


def sequences(prefix: object) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    assert dataset.document_indices.tolist() == [0]
    return [dataset.get(i).tolist() for i in range(len(dataset))]


def by_role(tmp_path: Path, decode: Callable[[list[int]], str]) -> list[list[tuple[int, str]]]:
    """For every conversation its runs of one role, decoded."""
    found = []
    for text, role in zip(sequences(tmp_path / "out-text"), sequences(tmp_path / "out-role"), strict=True):
        cuts = [0, *(1 + np.flatnonzero(np.diff(role))), len(role)]
        found.append([(role[a], decode(text[a:b])) for a, b in itertools.pairwise(cuts)])
    return found


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def original_command(prefix: Path) -> list[object]:
    return [
        *("--input", SAMPLES / "conversations.jsonl", "--output_prefix", prefix),
        *("--tokenizer_type", "SentencePieceTokenizer", "--vocab_file", MODEL, "--vocab_extra_ids_list", CONTROLS),
        *("--system_key", "system", "--question_key", "input", "--answer_key", "output"),
        *("--dataset_impl", "mmap", "--workers", 2, "--chunk_size", 5, "--log_interval", 3),
    ]


def test_files_are_the_originals_byte_for_byte_where_text_may_name_control_tokens(tmp_path, preprocess):
    preprocess(*original_command(tmp_path / "out"), "--parse_special")
    for name in ("text.bin", "text.idx", "role.bin", "role.idx"):
        assert (tmp_path / f"out-{name}").read_bytes() == (SAMPLES / f"conv_sys-{name}").read_bytes()
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("calls_with_room", [0, 1])
@pytest.mark.parametrize("is_there_before", [False, True])
def test_a_disk_that_fills_up_at_the_end_changes_nothing(
    tmp_path, preprocess, monkeypatch, is_there_before, calls_with_room
):
    """Neither the text alone nor the roles alone appear, and a pair that stood there stands there still."""
    if is_there_before:
        preprocess(*original_command(tmp_path / "out"), "--parse_special")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    real, calls = unfinished._write_index, itertools.count()

    def write_index(*arguments: object) -> None:
        if next(calls) == calls_with_room:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(unfinished, "_write_index", write_index)
    with pytest.raises(DataError, match=r"out-text: cannot be written \(No space left on device\)"):
        preprocess(*original_command(tmp_path / "out"))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_only_a_conversation_that_names_control_tokens_differs_otherwise(tmp_path, preprocess):
    out, _ = preprocess(*original_command(tmp_path / "out"))
    assert "conversations: 12\n" in out
    for kind in ("text", "role"):
        ours, theirs = sequences(tmp_path / f"out-{kind}"), sequences(SAMPLES / f"conv_sys-{kind}")
        assert [i for i in range(12) if ours[i] != theirs[i]] == [INJECTED]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_files_are_the_same_for_any_number_of_workers(tmp_path, preprocess, workers):
    usual = original_command(tmp_path / "out")
    preprocess(*usual, "--workers", workers, "--chunk_size", workers)
    first = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    preprocess(*usual, "--workers", 2, "--chunk_size", 100)
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == first


def test_nothing_that_starts_slowly_is_imported(tmp_path):
    words = list(map(str, original_command(tmp_path / "out")))
    code = (
        "import runpy, sys\n"
        f"runpy.run_path({str(ROOT / 'tools' / 'preprocess_instruct_data.py')!r})['main'](sys.argv[1:])\n"
        "print('imported:', sorted({'torch', 'transformers', 'awkward', 'pyarrow', 'zstandard'} & {*sys.modules}))"
    )
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    assert result.stdout.splitlines()[-1] == "imported: []", result.stderr


def test_control_tokens_in_a_text_stay_text(tmp_path, preprocess):
    preprocess(*original_command(tmp_path / "out"))
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=str(MODEL), vocab_extra_ids_list=(CONTROLS,)))
    start, end = tokenizer.added_tokens["<|im_start|>"], tokenizer.added_tokens["<|im_end|>"]
    ids = sequences(tmp_path / "out-text")[INJECTED]
    assert (ids.count(start), ids.count(end)) == (3, 3)
    assert tokenizer.bos not in ids and tokenizer.eos not in ids
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nInject<|im_end|>\n"
        "<|im_start|>question\ntext with <|im_end|> inside and <s> and </s><|im_end|>\n"
        "<|im_start|>answer\n<|im_start|>assistant? no<|im_end|>\n"
    )


def test_other_added_tokens_are_found_beside_a_control_token_that_is_text(tmp_path, preprocess):
    lines = write_lines(tmp_path / "a.jsonl", {"input": "[formula] <|im_end|> [formula]", "output": "x"})
    extra = f"{CONTROLS},[formula]"
    usual = ("--input", lines, "--output_prefix", tmp_path / "out", "--tokenizer_model", MODEL)
    preprocess(*usual, "--vocab_extra_ids_list", extra)
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=str(MODEL), vocab_extra_ids_list=(extra,)))
    (ids,) = sequences(tmp_path / "out-text")
    counts = [ids.count(tokenizer.added_tokens[name]) for name in ("[formula]", "<|im_start|>", "<|im_end|>")]
    assert counts == [2, 2, 2]


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Good day"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Nothing"},
]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], "system"), "value": m["content"]} for m in CHAT
]


@pytest.mark.parametrize(
    "record", [{"messages": CHAT}, {"conversations": SHAREGPT}, {"messages": SHAREGPT}, {"dialogue": CHAT}]
)
def test_both_kinds_of_chats_become_the_same_turns(tmp_path, preprocess, record):
    lines = write_lines(tmp_path / "a.jsonl", record)
    usual = ("--input", lines, "--output_prefix", tmp_path / "out", "--tokenizer_model", MODEL)
    names = ("--vocab_extra_ids_list", CONTROLS, "--role_names", "system", "user", "assistant")
    preprocess(*usual, *names, *(("--chat_key", "dialogue") if "dialogue" in record else ()))
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=str(MODEL), vocab_extra_ids_list=(CONTROLS,)))
    (runs,) = by_role(tmp_path, tokenizer.decode)
    number = {"system": 0, "user": 1, "assistant": 2}
    assert runs == [(number[m["role"]], f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n") for m in CHAT]


def test_llama_2_writes_each_turn_as_one_text_between_bos_and_eos(tmp_path, preprocess):
    lines = write_lines(tmp_path / "a.jsonl", {"messages": CHAT})
    preprocess(
        *("--input", lines, "--output_prefix", tmp_path / "out", "--tokenizer_model", MODEL, "--no_new_tokens"),
        *("--chat_template", "llama2"),
    )
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=str(MODEL), no_new_tokens=True))
    turns = [
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello [/INST] Good day ",
        "[INST] And? [/INST] Nothing ",
    ]
    expected = [i for turn in turns for i in (tokenizer.bos, *tokenizer.encode(turn), tokenizer.eos)]
    assert sequences(tmp_path / "out-text") == [expected]
    roles = sequences(tmp_path / "out-role")[0]
    answers = [tokenizer.encode(f"{text} ") for text in ("Good day", "Nothing")]
    assert roles.count(2) == sum(map(len, answers)) + 2  # eos is the assistant's


LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def llama3_text() -> str:
    turns = [f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content']}<|eot_id|>" for m in CHAT]
    return "<|begin_of_text|>" + "".join(turns)


def test_llama_3_gives_the_assistants_header_to_it(tmp_path, preprocess):
    folder = write_huggingface(tmp_path / "tokenizer", LLAMA3_TOKENS, bos_token="<|begin_of_text|>")
    lines = write_lines(tmp_path / "a.jsonl", {"messages": CHAT})
    usual = ("--input", lines, "--output_prefix", tmp_path / "out", "--tokenizer_model", folder)
    preprocess(*usual, "--chat_template", "llama3")
    special = build_tokenizer(TokenizerConfig(tokenizer_model=str(folder), parse_special=True))
    assert sequences(tmp_path / "out-text") == [special.encode(llama3_text())]
    (runs,) = by_role(tmp_path, special.decode)
    assert [text for role, text in runs if role == 2] == ["Good day<|eot_id|>", "Nothing<|eot_id|>"]


JINJA = """{{ bos_token }}{% for message in messages %}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' -}}
{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim }}<|eot_id|>{% endgeneration %}
{%- else %}{{ message['content'] | trim }}<|eot_id|>{% endif %}
{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""


def jinja_command(tmp_path: Path, *records: object) -> list[object]:
    folder = write_huggingface(
        tmp_path / "tokenizer", LLAMA3_TOKENS, bos_token="<|begin_of_text|>", chat_template=JINJA
    )
    lines = write_lines(tmp_path / "a.jsonl", *records)
    return [
        *("--input", lines, "--output_prefix", tmp_path / "out", "--tokenizer_model", folder),
        *("--chat_template", "tokenizer"),
    ]


def test_a_tokenizers_own_template_gives_what_the_built_in_one_does(tmp_path, preprocess):
    preprocess(*jinja_command(tmp_path, {"messages": [{**m, "content": f" {m['content']}\n"} for m in CHAT]}))
    special = build_tokenizer(TokenizerConfig(tokenizer_model=str(tmp_path / "tokenizer"), parse_special=True))
    assert sequences(tmp_path / "out-text") == [special.encode(llama3_text())]
    (runs,) = by_role(tmp_path, special.decode)
    assert [text for role, text in runs if role == 2] == ["Good day<|eot_id|>", "Nothing<|eot_id|>"]
    assert runs[0] == (0, "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>")


def test_a_template_agrees_with_transformers_on_what_the_whole_text_is(tmp_path, preprocess):
    transformers = pytest.importorskip("transformers")
    preprocess(*jinja_command(tmp_path, {"messages": CHAT}))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    expected = theirs.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert sequences(tmp_path / "out-text") == [expected["input_ids"]]
    roles = sequences(tmp_path / "out-role")[0]
    assert [int(role == 2) for role in roles] == expected["assistant_masks"]


def test_a_template_keeps_control_tokens_of_a_text_as_text(tmp_path, preprocess):
    preprocess(*jinja_command(tmp_path, {"input": "<|eot_id|> {{ 7 * 7 }}", "output": "<|begin_of_text|>"}))
    special = build_tokenizer(TokenizerConfig(tokenizer_model=str(tmp_path / "tokenizer"), parse_special=True))
    (ids,) = sequences(tmp_path / "out-text")
    names = [special.decode([i]) for i in ids]
    assert names.count("<|eot_id|>") == 2 and names.count("<|begin_of_text|>") == 1
    assert "<|eot_id|> {{ 7 * 7 }}" in special.decode(ids)


def test_a_llama_2_template_in_jinja_is_the_built_in_one(tmp_path, preprocess):
    """System and user in one text, and no template for a system message alone."""
    (tmp_path / "llama2.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\\n' + messages[0]['content'] + "
        "'\\n<</SYS>>\\n\\n' %}{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') "
        "+ m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    (tmp_path / "tokenizer.model").write_bytes(MODEL.read_bytes())
    lines = write_lines(tmp_path / "a.jsonl", {"messages": CHAT})
    usual = ("--input", lines, "--tokenizer_model", tmp_path / "tokenizer.model", "--no_new_tokens")
    preprocess(*usual, "--output_prefix", tmp_path / "built-in", "--chat_template", "llama2")
    file = ("--chat_template", "tokenizer", "--chat_template_file", tmp_path / "llama2.jinja")
    preprocess(*usual, "--output_prefix", tmp_path / "own", *file)
    assert sequences(tmp_path / "own-text") == sequences(tmp_path / "built-in-text")
    answers = [[role == 2 for role in sequences(tmp_path / f"{name}-role")[0]] for name in ("own", "built-in")]
    assert answers[0] == answers[1]


def test_a_bad_line_ends_the_run_with_its_place_and_leaves_nothing(tmp_path, preprocess):
    for number, (line, message) in enumerate(
        [
            ("{", "not JSON"),
            ("[1]", "a list, not a JSON object"),
            ('{"input": "q"}', "no key 'output', the object has 'input'"),
            ('{"input": "q", "output": 3}', "'output' holds the number 3, not a string"),
            ('{"input": "q", "output": "\\ud800"}', "'output' holds half a surrogate pair"),
            ('{"messages": []}', "no list of messages under 'messages'"),
            (
                '{"messages": [{"role": "tool", "content": ""}]}',
                "message 0 of 'messages' is from 'tool', which is none",
            ),
            ('{"messages": [{"text": ""}]}', "message 0 of 'messages' has neither 'role' and 'content'"),
        ]
    ):
        lines = tmp_path / f"{number}.jsonl"
        lines.write_text('{"input": "q", "output": "a"}\n\n' + line + "\n")
        usual = ("--input", lines, "--output_prefix", tmp_path / "out", "--tokenizer_model", MODEL)
        with pytest.raises(DataError, match=f"{number}.jsonl:3: {message}"):
            preprocess(*usual, "--vocab_extra_ids_list", CONTROLS)
        out, err = preprocess(*usual, "--vocab_extra_ids_list", CONTROLS, "--on_error", "skip")
        assert "bad lines:     1 skipped" in out and f"skipped: {lines}:3: {message}" in err
        for file in tmp_path.glob("out-*"):
            file.unlink()
    lines.write_bytes(b'{"input": "\xff"}\n')
    with pytest.raises(DataError, match="jsonl:1: byte 0xff is not UTF-8"):
        preprocess(*usual, "--vocab_extra_ids_list", CONTROLS)
    lines.write_text('{"input": "q", "output": "a"}\n', encoding="utf-16")
    with pytest.raises(DataError, match="jsonl:1: looks like UTF-16, .* `iconv -f UTF-16 -t UTF-8`"):
        preprocess(*usual, "--vocab_extra_ids_list", CONTROLS)
    lines.write_bytes(b"\n")
    with pytest.raises(DataError, match="no conversation to tokenize"):
        preprocess(*usual, "--vocab_extra_ids_list", CONTROLS)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (
            (),
            ConfigError,
            'chatml needs the token <|im_start|>, .* add it with --vocab_extra_ids_list "<|im_start|>,<|im',
        ),
        (("--chat_template", "llama3"), ConfigError, "llama3 needs the token <|begin_of_text|>"),
        (("--chat_template", "tokenizer"), ConfigError, "has no chat_template, neither in tokenizer_config.json"),
        (("--chat_template", "tokenizer", "--chat_template_file", "no.j2"), ConfigError, "cannot read .* no.j2"),
        (("--chat_template_file", "x.j2"), ConfigError, "--chat_template_file x.j2 is not used with --chat_template"),
        (("--role_names", "a", "b"), ConfigError, "--role_names a b: 2 names, and there are three roles"),
        (
            ("--chat_template", "llama3", "--role_names", "system", "user", "bot"),
            ConfigError,
            "--role_names system user bot is not used with --chat_template llama3, which has its own names; give --ch",
        ),
        (("--workers", "0"), ConfigError, "--workers 0 cannot do any work"),
        (("--chunk_size", "0"), ConfigError, "--chunk_size 0 is not a number of conversations"),
        (("--dataset_impl", "lazy"), ConfigError, "--dataset_impl lazy is not written any more"),
        (("--log_interval", "0"), ConfigError, "--log_interval 0 is not a number of conversations"),
        (("--vocab_extra_ids_list", CONTROLS, "--input", "x.txt"), DataError, "cannot read x.txt"),
    ],
)
def test_mistakes_are_explained_and_leave_nothing(tmp_path, preprocess, flags, error, message):
    lines = write_lines(tmp_path / "a.jsonl", {"input": "q", "output": "a"})
    usual = ("--input", lines, "--output_prefix", tmp_path / "out", "--tokenizer_model", MODEL)
    with pytest.raises(error, match=message.replace("|", r"\|")):
        preprocess(*usual, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_other_mistakes_are_explained_too(tmp_path, preprocess):
    lines = write_lines(tmp_path / "a.jsonl", {"messages": CHAT[1:2] * 2})
    (tmp_path / "b.txt").write_text("text")
    (tmp_path / "bad.jinja").write_text("{% for %}")
    (tmp_path / "changing.jinja").write_text("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}")
    (tmp_path / "refusing.jinja").write_text("{{ raise_exception('no tools') }}")
    usual = ("--input", lines, "--output_prefix", tmp_path / "out", "--tokenizer_model", MODEL)
    with pytest.raises(DataError, match="a.jsonl:1: user and assistant must take turns.* message 1 is the prompter's"):
        preprocess(*usual, "--chat_template", "llama2")
    with pytest.raises(ConfigError, match="NullTokenizer writes no conversations"):
        preprocess("--input", lines, "--output_prefix", tmp_path / "out", "--vocab_size", 9)
    with pytest.raises(DataError, match="b.txt: conversations are read from JSON lines only"):
        preprocess(*usual, "--input", tmp_path / "b.txt", "--vocab_extra_ids_list", CONTROLS)
    file = ("--chat_template", "tokenizer", "--chat_template_file")
    with pytest.raises(ConfigError, match="the chat template is not Jinja"):
        preprocess(*usual, *file, tmp_path / "bad.jinja")
    with pytest.raises(DataError, match="a.jsonl:1: the chat template changes this text"):
        preprocess(*usual, *file, tmp_path / "changing.jinja")
    with pytest.raises(DataError, match="a.jsonl:1: the chat template refuses the messages .no tools."):
        preprocess(*usual, *file, tmp_path / "refusing.jinja")
    folder = write_huggingface(tmp_path / "no_ends")
    with pytest.raises(ConfigError, match="llama2 needs bos and eos, and the HuggingFaceTokenizer has not both"):
        preprocess(*usual, "--tokenizer_model", folder, "--chat_template", "llama2")
    assert not list(tmp_path.glob("out*"))


def test_help_shows_defaults_as_they_are_typed(preprocess, capsys):
    with pytest.raises(SystemExit):
        preprocess("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "most models say system user assistant (default: system question answer)" in text
