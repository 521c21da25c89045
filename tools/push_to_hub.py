"""Upload an exported model to the Hugging Face hub.

    python tools/push_to_hub.py /path/to/hf somebody/my-model --private

The folder is checked first: every tensor that config.json asks for is there. An upload that was interrupted goes on
where it was when the same command is given again. The token is the one of `hf auth login` or of HF_TOKEN, unless
--token_file names another.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from tqdm import tqdm

from megatron.checkpoint.hf import CONFIG_FILE, HuggingFaceSource
from megatron.checkpoint.tokenizer_files import holds_tokenizer
from megatron.cli import ArgumentParser, run_main, warn
from megatron.errors import CheckpointError, ConfigError

MAIN_BRANCH = "main"
# What programs leave behind, which is nobody else's.
HIDDEN = (".*", "*/.*", "*.tmp")
# Loading one of these may run any program.
PICKLED = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    repository = _repository(args)
    token = _token(args)
    files = _files(args.folder)
    if not args.unsafe:
        _refuse_pickles(args.folder, files)
    size = tqdm.format_sizeof(sum(files.values()), "B")
    target = f"{repository}, branch {args.branch}"
    if args.dry_run:
        for name, num_bytes in files.items():
            print(f"{tqdm.format_sizeof(num_bytes, 'B'):>8}  {name}")
        print(f"would upload {len(files)} files, {size}, to {target}")
        return
    try:
        address = _upload(HfApi(token=token), args, repository, files)
    except CheckpointError:
        raise
    except Exception as error:  # the client passes on what its HTTP library raises, which differs between releases
        cause = " ".join(str(error).split())
        raise CheckpointError(
            f"{args.folder} could not be uploaded to {target} ({cause.replace(token, '***') if token else cause}); "
            "check the name, the network and `hf auth whoami`, and give the same command again to go on."
        ) from None
    print(f"uploaded {len(files)} files, {size}, to {address}")


def _parser() -> ArgumentParser:
    convert = "is for megatron_to_hf.py: give the folder to its --input_dir and upload what it writes."
    parser = ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        refused={
            **dict.fromkeys(("dtype", "max_shard_size", "output_folder"), convert),
            **dict.fromkeys(
                ("rope_scaling_type", "rope_scaling_factor"), "is config.json's: an export has its model's."
            ),
            "trust_remote_code": "does not exist: no program that comes with a model is run.",
        },
    )
    parser.add_argument("folder", type=Path, help="folder in Hugging Face's format, as megatron_to_hf.py writes it")
    parser.add_argument("repository", nargs="?", help="name on the hub: user/model or organisation/model")
    parser.add_argument("--hf_repo_name", help="another way to give the repository's name")
    parser.add_argument("--branch", default=MAIN_BRANCH, help="branch to upload to; created where it does not exist")
    parser.add_argument("--private", action="store_true", help="a repository that is created is visible to you only")
    parser.add_argument("--message", default="Upload model", help="message of the commit")
    parser.add_argument(
        "--token_file", type=Path, help="file with the token; default: that of `hf auth login` or HF_TOKEN"
    )
    parser.add_argument("--auth_token", help="the token itself; everybody on the machine can see it while this runs")
    parser.add_argument(
        "--unsafe", action="store_true", help=f"upload files that may be pickled, too: {', '.join(PICKLED)}"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="check the folder, list what would be uploaded, and stop"
    )
    return parser


def _repository(args: argparse.Namespace) -> str:
    names = {name for name in (args.repository, args.hf_repo_name) if name is not None}
    if len(names) != 1:
        given = " and ".join(sorted(names)) if names else "no repository"
        raise ConfigError(f"{given}: give one name on the hub, such as user/model, after the folder.")
    (name,) = names
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"{name} is no name on the hub ({str(error).rstrip('.')}); give user/model.") from error
    return name


def _token(args: argparse.Namespace) -> str | None:
    if args.auth_token is not None:
        warn("--auth_token is visible to everybody on this machine; `hf auth login`, HF_TOKEN or --token_file are not.")
    if args.token_file is None:
        return args.auth_token
    try:
        token = args.token_file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(
            f"--token_file {args.token_file} cannot be read ({error.strerror}); give its path."
        ) from error
    if not token or token.split() != [token]:
        raise ConfigError(f"--token_file {args.token_file} has to hold one token and nothing else; correct it.")
    return token


def _files(folder: Path) -> dict[str, int]:
    """Every file that is uploaded, with its bytes. Raises CheckpointError unless the folder holds a whole model."""
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{folder} is no model in Hugging Face's format (it has no {CONFIG_FILE}); make one of a checkpoint with "
            "weights_conversion/megatron_to_hf.py."
        )
    HuggingFaceSource(folder)
    if not holds_tokenizer(folder):
        warn(f"{folder} has no tokenizer; add one, or export again with megatron_to_hf.py --vocab_file.")
    found = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    visible = [path for path in found if path.suffix != ".tmp" and not any(p.startswith(".") for p in path.parts)]
    return {path.as_posix(): (folder / path).stat().st_size for path in visible}


def _refuse_pickles(folder: Path, files: Iterable[str]) -> None:
    if pickled := [name for name in files if Path(name).suffix.lower() in PICKLED]:
        more = f" and {len(pickled) - 3} more" if len(pickled) > 3 else ""
        raise CheckpointError(
            f"{folder} holds pickled files ({', '.join(pickled[:3])}{more}), which nobody should have to trust; write "
            "safetensors with weights_conversion/megatron_to_hf.py and upload those, or give --unsafe."
        )


def _upload(api: HfApi, args: argparse.Namespace, repository: str, files: dict[str, int]) -> str:
    """Returns the address. Raises CheckpointError if the hub then does not list every file with its size."""
    address = api.create_repo(repository, private=args.private or None, exist_ok=True)
    if args.branch != MAIN_BRANCH:
        api.create_branch(address.repo_id, branch=args.branch, exist_ok=True)
    api.upload_folder(
        repo_id=address.repo_id,
        folder_path=args.folder,
        revision=args.branch,
        commit_message=args.message,
        ignore_patterns=list(HIDDEN),
    )
    tree = api.list_repo_tree(address.repo_id, recursive=True, revision=args.branch)
    stored = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    if wrong := [name for name, num_bytes in files.items() if stored.get(name) != num_bytes]:
        raise CheckpointError(
            f"{', '.join(wrong)}: not on the hub with all bytes, though the upload ended; give the same command again."
        )
    return f"{address}/tree/{args.branch}" if args.branch != MAIN_BRANCH else str(address)


if __name__ == "__main__":
    run_main(main)
