"""The file: the same bits back, the same bytes each time, and one clear line for anything else."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from zolightning.policies import (
    BlockInfo,
    FeaturePolicy,
    Features,
    Normaliser,
    PertNN,
    Policy,
    Table,
    Uniform,
    library,
    load_policy,
    shipped,
)

BLOCKS = [BlockInfo("model.embed_tokens.weight", (40, 8)), BlockInfo("layers.0.up_proj.weight", (16, 8)), BlockInfo("norm.weight", (8,))]


def example() -> PertNN:
    policy = PertNN(hidden=5, seed=3, normaliser=Normaliser("published", batch_size=4, detached=True)).bind(BLOCKS)
    policy.base_model, policy.trained, policy.results = "me/model", {"steps": 500, "tasks": ["sst2"]}, {"sst2": {"loss": 0.25}}
    return policy


def test_everything_comes_back(tmp_path: Path) -> None:
    policy = example()
    path = policy.save_pretrained(tmp_path / "p.safetensors")
    again = Policy.from_pretrained(path)
    assert type(again) is PertNN
    assert again.config() == {"hidden": 5, "seed": 3}
    for name in ("normaliser", "blocks", "base_model", "trained", "results"):
        assert getattr(again, name) == getattr(policy, name)
    for (name, value), (other, same) in zip(policy.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(value, same)
    assert all(parameter.requires_grad for parameter in again.parameters())
    raw = policy(Features.reference(BLOCKS))
    assert torch.equal(again(Features.reference(BLOCKS)), raw)
    assert torch.equal(again.normalise(raw), policy.normalise(raw))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_policies_have_equal_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    paths = [example().save_pretrained(tmp_path / name, dtype) for name in ("a.safetensors", "b.safetensors")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    again = PertNN.from_pretrained(paths[0])
    assert again.weight_in.dtype == torch.float32
    assert torch.equal(again.weight_in, example().weight_in.to(dtype).float())
    assert again.save_pretrained(tmp_path / "c.safetensors", dtype).read_bytes() == paths[0].read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors", "c.safetensors"], "no draft is left"


def test_a_folder_stands_for_its_policy(tmp_path: Path) -> None:
    assert example().save_pretrained(tmp_path) == tmp_path / "policy.safetensors"
    assert isinstance(Policy.from_pretrained(tmp_path), PertNN)


def test_writing() -> None:
    with pytest.raises(ValueError, match="a policy without blocks has nothing to store"):
        PertNN().save_pretrained("nowhere.safetensors")
    with pytest.raises(ValueError, match=r"dtype=torch.int8 must be float32, bfloat16 or float16"):
        example().save_pretrained("nowhere.safetensors", torch.int8)
    policy = Table.of(BLOCKS, torch.tensor([1.0, 1e30, 1.0]))
    with pytest.raises(ValueError, match="'values' holds values that are not finite in float16"):
        policy.save_pretrained("nowhere.safetensors", torch.float16)
    policy.results = {"loss": object()}
    with pytest.raises(ValueError, match="the description of a policy must be plain JSON"):
        policy.save_pretrained("nowhere.safetensors")
    assert not Path("nowhere.safetensors").exists()


def described(path: Path, change: Callable[[dict[str, Any]], Any], tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """A policy file whose description (and tensors) were tampered with."""
    example().save_pretrained(path)
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    description = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["zolightning_policy"])
    description.pop("blake2b")  # who tampers can leave it out
    changed = change(description)
    text = changed if isinstance(changed, str) else json.dumps(description if changed is None else changed)
    save_file(tensors if tensors is not None else dict(example().state_dict()), path, metadata={"zolightning_policy": text})
    return path


def put(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda description: description.update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: "{", "the description is not JSON"),
        (lambda d: "[" * 100_000, "the description is not JSON"),
        (lambda d: [1], "format 'None' is not the one that this version reads (1)"),
        (put(format=2), "format '2' is not the one that this version reads (1)"),
        (lambda d: d.pop("config") and None, "'config' is missing or no dict"),
        (put(blocks={}), "'blocks' is missing or no list"),
        (put(base_model=3), "'base_model' is missing or no str"),
        (put(kind="Trojan"), "'Trojan' is no known kind of policy ("),
        (put(kind="os.system"), "'os.system' is no known kind of policy"),
        (put(config={"hidden": 5, "payload": 1}), "PertNN has no setting 'payload'"),
        (put(config={"hidden": 10**30}), "PertNN cannot be built as described: hidden=1000000000"),
        (put(config={"hidden": "5"}), "PertNN cannot be built as described: hidden='5' must be an integer"),
        (put(config={"hidden": 65536}), "tensor 'bias_in' has shape (3, 5), expected (3, 65536)"),
        (put(config={"hidden": 5, "normaliser": {}}), "PertNN has no setting 'normaliser'"),
        (put(normaliser={"rule": "x"}), "PertNN cannot be built as described: rule='x' must be"),
        (put(normaliser={"rules": 1}), "PertNN cannot be built as described: "),
        (put(blocks=[]), "it is for no blocks"),
        (put(blocks=[["a", [1]], ["a", [1]]]), "a block is there twice"),
        (put(blocks=[["a", [1]]]), "tensor 'bias_in' has shape (3, 5), expected (1, 5)"),
        (put(blocks=[["a", [1]]] * 4), "a block is there twice"),
        (put(blocks=[["a"]]), """"['a']" is no block: expected [name, shape]"""),
        (put(blocks=[["a", [-1]]]), "is no block"),
        (put(blocks=[["a", [1 << 50]]]), "is no block"),
        (put(blocks=[["a", [1.5]]]), "is no block"),
        (put(blocks=[["a", [True]]]), "is no block"),
        (put(blocks=[[3, [1]]]), "is no block"),
        (put(kind="Table", config={}), "tensor 'bias_in' has shape (3, 5), expected None"),
    ],
    ids=range(27),
)
def test_tampered_descriptions(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    path = described(tmp_path / "p.safetensors", change)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Policy.from_pretrained(path)
    assert str(error.value).startswith(f"policy {str(path)!r}: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(path))


def test_tampered_tensors(tmp_path: Path) -> None:
    good = dict(example().state_dict())
    cases = (
        ({**good, "more": torch.zeros(1)}, "tensor 'more' has shape (1,), expected None"),
        ({name: good[name] for name in list(good)[1:]}, "tensor 'weight_in' has shape None, expected (3, 5, 5)"),
        ({**good, "bias_out": torch.tensor([1.0, float("nan"), 1.0])}, "'bias_out' holds values that are not finite"),
        ({**good, "bias_out": torch.zeros(3, dtype=torch.float64)}, "'bias_out' is F64, expected F32, BF16 or F16"),
        ({**good, "bias_out": torch.zeros(3, dtype=torch.int64)}, "'bias_out' is I64, expected F32, BF16 or F16"),
    )
    for tensors, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            Policy.from_pretrained(described(tmp_path / "p.safetensors", lambda d: None, tensors))


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = example().save_pretrained(tmp_path / "p.safetensors")
    whole = path.read_bytes()
    for content in (b"", b"x", whole[:-1], whole[:100], struct.pack("<Q", 1 << 62) + whole[8:], whole + b"x", b"PK\x03\x04" + whole):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no safetensors file, or damaged") as error:
            Policy.from_pretrained(path)
        assert "\n" not in str(error.value)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds tensors, but no policy"):
        Policy.from_pretrained(path)
    with pytest.raises(ValueError, match="does not exist"):
        Policy.from_pretrained(tmp_path / "missing")
    monkeypatch.setattr("zolightning.policies.file._LARGEST", 10)
    with pytest.raises(ValueError, match="bytes; more than 10 is no policy"):
        Policy.from_pretrained(path)


def test_a_class_reads_only_its_own(tmp_path: Path) -> None:
    path = example().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it holds a PertNN, not a Table"):
        Table.from_pretrained(path)


def test_unknown_shapes_survive(tmp_path: Path) -> None:
    policy = Uniform().bind([BlockInfo("a"), BlockInfo("b", (3,))])
    assert Policy.from_pretrained(policy.save_pretrained(tmp_path)).blocks == policy.blocks


def test_the_shipped_one_is_the_one_that_was_chosen() -> None:
    """Frozen before the tasks were looked at that it is judged by."""
    path, root = shipped()["smollm2-135m-instruct"], Path(__file__).parents[2]
    assert path.read_bytes() == (root / "docs" / "results" / "policy" / "ours.safetensors").read_bytes()
    assert path.stat().st_size < 700_000
    policy = load_policy("smollm2-135m-instruct")
    assert (type(policy).__name__, policy.base_model, len(policy.blocks)) == ("LossTable", "smollm2-135m-instruct", 272)


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(isinstance(load_policy(name), Policy) for name in shipped())
    monkeypatch.setattr(library, "_SHIPPED", tmp_path / "shipped")
    (tmp_path / "shipped" / "family").mkdir(parents=True)
    FeaturePolicy().bind(BLOCKS).save_pretrained(tmp_path / "shipped" / "family" / "one.safetensors")
    assert isinstance(load_policy("family/one"), FeaturePolicy)
    with pytest.raises(ValueError, match=r"policy 'two' is neither a file nor a shipped policy \(family/one\)"):
        load_policy("two")
    with pytest.raises(ValueError, match="is neither a file nor a shipped policy"):
        load_policy("../shipped/family/one")


@pytest.mark.parametrize("place", ["tensors", "description"])
def test_a_bit_that_changed(place: str, tmp_path: Path) -> None:
    """Values that are still finite numbers, names that are still names: only the checksum tells."""
    path = example().save_pretrained(tmp_path)
    data = bytearray(path.read_bytes())
    at = len(data) - 4 if place == "tensors" else data.index(b'\\"trained\\"') - 4
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged|JSON"):
        Policy.from_pretrained(path)
