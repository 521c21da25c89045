"""Uploading: what is checked, what is sent, and that a token is never shown. No hub is asked."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import RepoUrl
from huggingface_hub.hf_api import RepoFile

from hf_folders import save_llama
from megatron.errors import CheckpointError, ConfigError, MegatronError

TOOL = Path(__file__).parents[2] / "tools" / "push_to_hub.py"
TOKEN = "hf_aVerySecretToken"


class Hub:
    """Stands for `HfApi`: remembers the calls and lists what was uploaded, but for `lost`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.token: object = None
        self.lost: set[str] = set()
        self.error: Exception | None = None

    def __call__(self, token: str | None) -> Hub:
        self.token = token
        return self

    def create_repo(self, repository: str, **options: Any) -> RepoUrl:
        self.calls.append(("create_repo", {"repository": repository, **options}))
        if self.error is not None:
            raise self.error
        return RepoUrl(f"https://huggingface.co/{repository}")

    def create_branch(self, repository: str, **options: Any) -> None:
        self.calls.append(("create_branch", {"repository": repository, **options}))

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload_folder", options))

    def list_repo_tree(self, repository: str, **options: Any) -> list[object]:
        folder = self.calls[-1][1]["folder_path"]
        files = [file for file in Path(folder).rglob("*") if file.is_file() and file.name not in self.lost]
        entries = [(file.relative_to(folder).as_posix(), file.stat().st_size) for file in files]
        return [SimpleNamespace(path="a folder"), *(RepoFile(path=p, size=size, oid="0") for p, size in entries)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_llama(tmp_path_factory.mktemp("models") / "tiny", max_shard_size="80KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "note").write_text("mine")
    (folder / "draft.tmp").write_text("mine")
    return folder


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("push_to_hub", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(tool, "HfApi", hub)
    return hub


def message_of(tool: ModuleType, *arguments: object, kind: type[MegatronError] = ConfigError) -> str:
    with pytest.raises(kind) as error:
        tool.main([str(argument) for argument in arguments])
    return str(error.value)


def test_a_folder_is_uploaded_to_a_new_repository_with_the_clients_own_token(
    tool: ModuleType, hub: Hub, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool.main([str(model), "somebody/tiny"])
    assert hub.token is None
    assert hub.calls == [
        ("create_repo", {"repository": "somebody/tiny", "private": None, "exist_ok": True}),
        (
            "upload_folder",
            {
                "repo_id": "somebody/tiny",
                "folder_path": model,
                "revision": "main",
                "commit_message": "Upload model",
                "ignore_patterns": [".*", "*/.*", "*.tmp"],
            },
        ),
    ]
    num_files = len([file for file in model.iterdir() if file.is_file() and file.suffix != ".tmp"])
    out = capsys.readouterr().out
    assert out.startswith(f"uploaded {num_files} files, ") and out.endswith(
        ", to https://huggingface.co/somebody/tiny\n"
    )


def test_private_branch_and_message_are_passed_on(
    tool: ModuleType, hub: Hub, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--hf-repo-name=somebody/tiny", "--private", "--branch=step-500", "--message=After 500 steps"]
    tool.main([str(model), *flags])
    assert hub.calls[0][1]["private"] is True
    assert hub.calls[1] == ("create_branch", {"repository": "somebody/tiny", "branch": "step-500", "exist_ok": True})
    upload = hub.calls[2][1]
    assert (upload["revision"], upload["commit_message"]) == ("step-500", "After 500 steps")
    assert capsys.readouterr().out.endswith("to https://huggingface.co/somebody/tiny/tree/step-500\n")


def test_a_dry_run_lists_what_would_be_uploaded_and_asks_nobody(
    tool: ModuleType, hub: Hub, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool.main([str(model), "somebody/tiny", "--dry_run"])
    *listed, last = capsys.readouterr().out.splitlines()
    names = {line.split("  ")[-1] for line in listed}
    assert names == {file.name for file in model.iterdir() if file.is_file() and file.suffix != ".tmp"}
    assert last.startswith(f"would upload {len(names)} files, ") and last.endswith(", to somebody/tiny, branch main")
    assert hub.calls == []


@pytest.mark.parametrize("by_file", [True, False])
def test_a_token_is_used_and_never_shown(
    tool: ModuleType, hub: Hub, model: Path, by_file: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    flag = f"--token_file={tmp_path / 'token'}" if by_file else f"--auth_token={TOKEN}"
    tool.main([str(model), "somebody/tiny", flag])
    assert hub.token == TOKEN
    hub.error = ValueError(f"401 for Bearer {TOKEN}\n of  somebody")
    message = message_of(tool, model, "somebody/tiny", flag, kind=CheckpointError)
    assert message == (
        f"{model} could not be uploaded to somebody/tiny, branch main (401 for Bearer *** of somebody); check the "
        "name, the network and `hf auth whoami`, and give the same command again to go on."
    )
    captured = capsys.readouterr()
    assert TOKEN not in captured.out + captured.err
    warning = (
        "warning: --auth_token is visible to everybody on this machine; `hf auth login`, HF_TOKEN or --token_file are "
        "not.\n"
    )
    assert captured.err == ("" if by_file else warning * 2)


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "cannot be read"), ("", "has to hold"), ("a b", "has to hold")]
)
def test_a_token_file_without_a_token_is_named(
    tool: ModuleType, model: Path, content: str | None, problem: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "token").write_text(content)
    message = message_of(tool, model, "somebody/tiny", f"--token_file={tmp_path / 'token'}")
    endings = {
        "cannot be read": "cannot be read (No such file or directory); give its path.",
        "has to hold": "has to hold one token and nothing else; correct it.",
    }
    assert message == f"--token_file {tmp_path / 'token'} {endings[problem]}"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no repository: give one name on the hub, such as user/model, after the folder."),
        (
            ["a/b", "--hf_repo_name=c/d"],
            "a/b and c/d: give one name on the hub, such as user/model, after the folder.",
        ),
    ],
)
def test_one_repository_has_to_be_named(tool: ModuleType, model: Path, names: list[str], message: str) -> None:
    assert message_of(tool, model, *names) == message


def test_a_name_that_the_hub_would_refuse_is_refused_here(tool: ModuleType, model: Path) -> None:
    message = message_of(tool, model, "a/b/c")
    assert message.startswith("a/b/c is no name on the hub (") and message.endswith("); give user/model.")


def test_files_that_the_hub_does_not_list_are_named(tool: ModuleType, hub: Hub, model: Path) -> None:
    hub.lost = {"config.json", "tokenizer.json"}
    assert message_of(tool, model, "somebody/tiny", kind=CheckpointError) == (
        "config.json, tokenizer.json: not on the hub with all bytes, though the upload ended; give the same command "
        "again."
    )


def test_a_checkpoint_has_to_be_exported_first(tool: ModuleType, tmp_path: Path) -> None:
    assert message_of(tool, tmp_path, "somebody/tiny", kind=CheckpointError) == (
        f"{tmp_path} is no model in Hugging Face's format (it has no config.json); make one of a checkpoint with "
        "weights_conversion/megatron_to_hf.py."
    )


def test_an_incomplete_model_is_not_uploaded(tool: ModuleType, hub: Hub, tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "tiny", max_shard_size="80KB")
    min(folder.glob("model-*.safetensors")).unlink()
    assert "names model-00001-of-" in message_of(tool, folder, "somebody/tiny", kind=CheckpointError)
    assert hub.calls == []


def test_pickled_files_are_not_uploaded_unless_asked_for(
    tool: ModuleType, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_llama(tmp_path / "tiny")
    remedy = (
        "which nobody should have to trust; write safetensors with weights_conversion/megatron_to_hf.py and upload "
        "those, or give --unsafe."
    )
    (folder / "original").mkdir()
    names = ["a.bin", "b.PT", "c.pkl", "d.ckpt", "original/e.pth"]
    for name in names:
        torch.save({}, folder / name)
        assert message_of(tool, folder, "somebody/tiny", kind=CheckpointError) == (
            f"{folder} holds pickled files ({name}), {remedy}"
        )
        (folder / name).rename(folder / ".hidden")
    for name in names:
        (folder / name).touch()
    assert message_of(tool, folder, "somebody/tiny", "--dry_run", kind=CheckpointError) == (
        f"{folder} holds pickled files (a.bin, b.PT, c.pkl and 2 more), {remedy}"
    )
    assert hub.calls == []
    tool.main([str(folder), "somebody/tiny", "--unsafe", "--dry_run"])
    listed = capsys.readouterr().out
    assert all(f"  {name}\n" in listed for name in names)


def test_a_missing_tokenizer_is_told(
    tool: ModuleType, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_llama(tmp_path / "tiny")
    tool.main([str(folder), "somebody/tiny", "--dry_run"])
    assert capsys.readouterr().err.endswith(
        f"warning: {folder} has no tokenizer; add one, or export again with megatron_to_hf.py --vocab_file.\n"
    )


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (flag, f"--{flag} {reason}")
        for flags, reason in [
            (
                ("dtype", "max_shard_size", "output_folder"),
                "is for megatron_to_hf.py: give the folder to its --input_dir and upload what it writes.",
            ),
            (("rope_scaling_type", "rope_scaling_factor"), "is config.json's: an export has its model's."),
            (("trust_remote_code",), "does not exist: no program that comes with a model is run."),
        ]
        for flag in flags
    ],
)
def test_flags_of_other_programs_are_refused_with_the_reason(
    tool: ModuleType, model: Path, flag: str, message: str
) -> None:
    assert message_of(tool, model, "somebody/tiny", f"--{flag}=1") == message
