"""Synthetic bfloat16 families with the shapes of real models, written fast and without torch.

A family is four Hugging Face folders: base, instruct = base + small steps, and math and code =
instruct + smaller steps, whose size varies from tensor to tensor. All noise is cut at seeded
offsets from one short random block, so that gigabytes take seconds and the same seed gives the
same bytes.

    python -m benchmarks.synthetic --scale 1b benchmarks/work/1b
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

SEED = 0
CHUNK = 1 << 18
POOL = 1 << 22
# Which terms a member is the sum of, and how large each is (standard deviation).
MEMBERS = {
    "base": ("base",),
    "instruct": ("base", "instruct"),
    "math": ("base", "instruct", "math"),
    "code": ("base", "instruct", "code"),
}
TERMS = {"base": 0.02, "instruct": 2e-3, "math": 6e-4, "code": 6e-4}

Tensors = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Shapes:
    """A Llama (or, with `experts_until`, a Qwen3-MoE) by its sizes."""

    hidden: int
    blocks: int
    kv: int
    mlp: int
    vocab: int
    head: int = 64
    experts_until: int = 0  # number of tensors in all, reached by adding experts
    shard_bytes: int = 2_500_000_000

    def tensors(self) -> Tensors:
        """Name and shape of every tensor; embeddings are tied, so there is no head."""
        table: Tensors = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for block in range(self.blocks):
            table |= {f"model.layers.{block}.{name}.weight": s for name, s in self._block().items()}
        table["model.norm.weight"] = (self.hidden,)
        missing = max(0, self.experts_until - len(table))
        return table | dict(islice(self._experts(), missing))

    def config(self) -> dict[str, Any]:
        """What config.json says; enough for transformers and mergekit to know the architecture."""
        moe = self.experts_until > 0
        return {
            "architectures": ["Qwen3MoeForCausalLM" if moe else "LlamaForCausalLM"],
            "model_type": "qwen3_moe" if moe else "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.hidden // self.head,
            "num_key_value_heads": self.kv // self.head,
            "head_dim": self.head,
            "vocab_size": self.vocab,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        }

    def _block(self) -> Tensors:
        h = self.hidden
        attention = {"q": (h, h), "k": (self.kv, h), "v": (self.kv, h), "o": (h, h)}
        mlp = {"gate": (self.mlp, h), "up": (self.mlp, h), "down": (h, self.mlp)}
        norms: Tensors = {"input_layernorm": (h,), "post_attention_layernorm": (h,)}
        parts: Tensors = {f"self_attn.{k}_proj": s for k, s in attention.items()}
        if not self.experts_until:
            parts |= {f"mlp.{k}_proj": s for k, s in mlp.items()}
        return norms | parts

    def _experts(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for expert in count():
            for block in range(self.blocks):
                prefix = f"model.layers.{block}.mlp.experts.{expert}"
                yield f"{prefix}.gate_proj.weight", (self.mlp, self.hidden)
                yield f"{prefix}.up_proj.weight", (self.mlp, self.hidden)
                yield f"{prefix}.down_proj.weight", (self.hidden, self.mlp)


_1B = Shapes(hidden=2048, blocks=16, kv=512, mlp=8192, vocab=128_256)
_TINY = Shapes(hidden=256, blocks=8, kv=64, mlp=1024, vocab=8192)
SCALES = {
    "tiny": _TINY,
    "tiny2": replace(_TINY, blocks=18),  # twice the bytes of tiny
    "135m": Shapes(hidden=576, blocks=30, kv=192, mlp=1536, vocab=49_152),  # as SmolLM2-135M
    "1b": _1B,
    "2b": replace(_1B, blocks=36),  # twice the bytes of 1b
}


def named(name: str) -> Shapes:
    """The shapes that a name stands for: a scale, or `moe-N`, `moe-N-sharded`, `deep-N`.

    N is the number of tensors, about; `moe` has 20 blocks of experts, `deep` very many blocks, for
    peers that know no loose experts; `sharded` means about 20 shards.
    """
    if name in SCALES:
        return SCALES[name]
    kind, _, rest = name.partition("-")
    number, _, suffix = rest.partition("-")
    if kind not in ("moe", "deep") or not number.isdigit() or suffix not in ("", "sharded"):
        raise ValueError(f"no family is called {name!r}: {', '.join(SCALES)}, moe-N, deep-N")
    small = Shapes(hidden=32, blocks=20, kv=16, mlp=32, vocab=256, head=16)
    if kind == "deep":
        return replace(small, blocks=(int(number) - 2) // 9)
    shapes = replace(small, experts_until=int(number))
    return replace(shapes, shard_bytes=family_bytes(shapes) // 20) if suffix else shapes


def family_bytes(shapes: Shapes) -> int:
    """Bytes of the weights of one member."""
    return sum(2 * prod(shape) for shape in shapes.tensors().values())


def write_family(shapes: Shapes, folder: Path, *, seed: int = SEED) -> None:
    """Write the four members under `folder`, unless this very family is there already."""
    stamp = folder / "complete.json"
    label = json.dumps({"format": 1, "seed": seed, "terms": TERMS, **asdict(shapes)})
    if stamp.exists() and stamp.read_text() == label:
        return
    shutil.rmtree(folder, ignore_errors=True)
    pool = np.random.default_rng(seed).standard_normal(POOL + CHUNK, dtype=np.float32)
    with ThreadPoolExecutor(2) as threads:
        for done in [
            threads.submit(_write_member, shapes, folder / member, terms, pool, seed)
            for member, terms in MEMBERS.items()
        ]:
            done.result()
    stamp.write_text(label)


def write_adapters(shapes: Shapes, folder: Path, *, rank: int, seed: int = SEED) -> None:
    """Write LoRA adapters for math and code over every linear layer, as PEFT names them.

    Their products are about as large as the steps of the full fine-tunes.
    """
    linear = {n: s for n, s in shapes.tensors().items() if n.endswith("_proj.weight")}
    for task in ("math", "code"):
        rng = np.random.default_rng([seed, list(TERMS).index(task), rank])
        table: Tensors = {}
        for name, (outs, ins) in linear.items():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            table |= {f"{module}.lora_A.weight": (rank, ins)}
            table |= {f"{module}.lora_B.weight": (outs, rank)}
        into = folder / f"{task}-lora"
        into.mkdir(parents=True, exist_ok=True)
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "fan_in_fan_out": False}
        (into / "adapter_config.json").write_text(json.dumps(config))
        with (into / "adapter_model.safetensors").open("wb") as stream:
            _write_header(stream, table)
            size = np.float32((TERMS[task] / rank**0.5) ** 0.5)
            for shape in table.values():
                values = rng.standard_normal(prod(shape), dtype=np.float32)
                stream.write(_bfloat16(size * values))


def _write_member(
    shapes: Shapes, folder: Path, terms: tuple[str, ...], pool: NDArray[np.float32], seed: int
) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shapes.config(), indent=2))
    table = shapes.tensors()
    number = {name: index for index, name in enumerate(table)}
    shards = _shards(table, shapes.shard_bytes)
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        with (folder / file).open("wb") as stream:
            _write_header(stream, shard)
            for name, shape in shard.items():
                for values in _values(name, prod(shape), terms, pool, [seed, number[name]]):
                    stream.write(_bfloat16(values))
    if len(shards) > 1:
        content = {"metadata": {"total_size": family_bytes(shapes)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2))


def _shards(table: Tensors, limit_bytes: int) -> list[Tensors]:
    shards: list[Tensors] = [{}]
    size = 0
    for name, shape in table.items():
        size += 2 * prod(shape)
        if size > limit_bytes and shards[-1]:
            shards.append({})
            size = 2 * prod(shape)
        shards[-1][name] = shape
    return shards


def _write_header(stream: BinaryIO, shard: Tensors) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shard.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)


def _values(
    name: str, size: int, terms: tuple[str, ...], pool: NDArray[np.float32], seed: list[int]
) -> Iterator[NDArray[np.float32]]:
    """The values of one tensor, chunk by chunk, before rounding."""
    mean = np.float32(1.0 if name.endswith("norm.weight") else 0.0)
    starts = range(0, size, CHUNK)
    noise = []
    for term in terms:
        draw = np.random.default_rng([*seed, list(TERMS).index(term)])
        spread = 1.0 if term == "base" else float(np.exp(draw.normal(0.0, 0.5)))
        offsets = draw.integers(0, POOL, len(starts))
        noise.append((np.float32(TERMS[term] * spread), offsets))
    for index, start in enumerate(starts):
        total = np.full(min(CHUNK, size - start), mean, dtype=np.float32)
        for scale, offsets in noise:
            total += scale * pool[offsets[index] :][: total.size]
        yield total


def _bfloat16(values: NDArray[np.float32]) -> bytes:
    """Finite float32 rounded to nearest even, as the bits of bfloat16."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description="write a synthetic family of checkpoints")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", default="tiny", help="tiny, tiny2, 1b, 2b, moe-N, deep-N")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    write_family(named(options.scale), options.folder, seed=options.seed)


if __name__ == "__main__":
    main()
