"""A checkpoint written before a field of the model's configuration existed is still the model that it was."""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path

from megatron.checkpoint.manifest import MANIFEST_FILE, Manifest, read_manifest, write_manifest
from megatron.checkpoint.source import CheckpointInfo, RunState
from megatron.model.config import ModelConfig


def test_fields_that_a_manifest_lacks_take_their_defaults(tmp_path: Path) -> None:
    model = ModelConfig(num_layers=2, hidden_size=24, num_attention_heads=4, vocab_size=11, max_position_embeddings=8)
    write_manifest(tmp_path, Manifest({}, {}, CheckpointInfo(state=RunState(iteration=3), model=model)))
    path = tmp_path / MANIFEST_FILE
    content = json.loads(path.read_bytes())
    required = {field.name for field in dataclasses.fields(ModelConfig) if field.default is dataclasses.MISSING}
    content["model"] = {
        name: value for name, value in content["model"].items() if name in required or name == "rope_scaling"
    }
    del content["crc32"]
    body = json.dumps(content)[1:].encode()
    path.write_bytes(b'{"crc32": "%08x",\n' % zlib.crc32(body) + body)
    assert read_manifest(tmp_path).info.model == model
