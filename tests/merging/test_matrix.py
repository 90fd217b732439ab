"""Methods on whole matrices and tensors, from recipe to folder, against formulas in NumPy."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from tests.conftest import read_checkpoint, read_raw, write_checkpoint

from taskvec.errors import OutputError, ParameterError
from taskvec.merging.decide import decide_table
from taskvec.merging.prepare import prepare
from taskvec.outputs import run as engine
from taskvec.outputs.verify import verify
from taskvec.recipes.reading import load_recipe

SCALES = {"a": 0.61, "b": 0.87, "c": -0.4}
SHAPES = {
    "tall": (30, 12), "wide": (12, 31), "square": (9, 9), "column": (6, 1), "row": (1, 5),
    "vector": (7,), "scalar": (), "one": (1,), "none": (0, 3), "convolution": (3, 2, 2),
}  # fmt: skip
SINGLE = {"out": {"dtype": "float32"}}
NAMES = ("tsv", "iso_c", "iso_cts", "sce", "ram", "ram_plus", "nearswap", "safety_arithmetic")


def members(seed: int = 0) -> dict[str, dict]:
    """An anchor and three tasks; each task leaves a third of the entries as they are."""
    random = np.random.default_rng(seed)
    anchor = {n: random.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}
    found = {"anchor": anchor}
    for task in SCALES:
        found[task] = {
            n: (v + 0.1 * random.normal(size=v.shape) * (random.random(v.shape) > 0.3)).astype("f4")
            for n, v in anchor.items()
        }
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, weights in members().items():
        write_checkpoint(tmp_path / name, weights, "F32")
    return tmp_path


def merged(root: Path, method, scales=SCALES, to="out", options=None, **more) -> Path:
    data = {
        "anchor": "anchor",
        "tasks": {t: {"model": t, "scale": s} for t, s in scales.items()},
        "method": method,
        "out": {"dtype": "float64", "precision": "float64"},
    } | more
    (root / f"{to}.yaml").write_text(yaml.safe_dump(data))
    recipe = load_recipe(root / f"{to}.yaml")
    path = engine.run(recipe, root / to, options=options or engine.RunOptions()).path
    assert path is not None
    return path


def vectors(root: Path, scales=SCALES) -> tuple[dict, dict[str, list]]:
    """θ_pre, and the τ_t of every tensor in the order of the tasks, float64."""
    anchor = {n: v.astype(float) for n, v in read_checkpoint(root / "anchor").items()}
    tasks = [read_checkpoint(root / t) for t in sorted(scales)]
    return anchor, {n: [t[n].astype(float) - anchor[n] for t in tasks] for n in anchor}


# The formulas, written from the papers; every matrix here has full rank.


def polar(matrix):
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


def tsv(taus, scales):
    shape, tasks = taus[0].shape, len(taus)
    if len(shape) != 2 or min(shape) < tasks:
        return sum(s * t for s, t in zip(scales, taus, strict=True)) / tasks
    k = min(shape) // tasks
    parts = [np.linalg.svd(t, full_matrices=False) for t in taus]
    u = np.concatenate([p[0][:, :k] for p in parts], 1)
    v = np.concatenate([p[2][:k] for p in parts], 0)
    sizes = np.concatenate([s * p[1][:k] for s, p in zip(scales, parts, strict=True)])
    return polar(u) @ np.diag(sizes) @ polar(v)


def iso_c(taus, scales):
    total = sum(s * t for s, t in zip(scales, taus, strict=True))
    if total.ndim != 2:
        return total / len(taus)
    if not total.size:
        return total
    u, sizes, v = np.linalg.svd(total, full_matrices=False)
    return sizes.mean() * u @ v


def iso_cts(taus, scales, share=0.8):
    taus = [s * t for s, t in zip(scales, taus, strict=True)]
    total = sum(taus)
    if total.ndim != 2:
        return total / len(taus)
    if not total.size:
        return total
    rank = min(total.shape)
    own = round((rank - int(rank * share)) / len(taus))
    common = rank - own * len(taus)
    u, s, v = np.linalg.svd(total, full_matrices=False)
    us, ss, vs = [u[:, :common]], [s[:common]], [v[:common]]
    for tau in taus:
        rest = tau - us[0] @ us[0].T @ tau
        u, s, v = np.linalg.svd(rest, full_matrices=False)
        us, ss, vs = [*us, u[:, :own]], [*ss, s[:own]], [*vs, v[:own]]
    sizes = np.concatenate(ss)
    return polar(np.concatenate(us, 1)) @ polar(np.concatenate(vs)) * sizes.mean()


def sce(taus, scales, density=0.1, mean=False, varying=False, floor=0.0):
    taus = np.stack(taus)
    kept = np.zeros(taus[0].size)
    order = np.argsort(-taus.var(0).ravel(), kind="stable")
    counted = np.ptp(taus, 0).astype(bool).sum() if varying else kept.size
    kept[order[: round(density * counted)]] = 1
    taus = taus * kept.reshape(taus.shape[1:])
    energies = [(t**2).sum() for t in taus]
    if not sum(energies):
        return taus[0]
    if sum(energies) / taus[0].size < floor:
        energies = np.ones(len(taus))
    sign = np.sign(sum(s * t for s, t in zip(scales, taus, strict=True)))
    agree = [(np.sign(s * t) == sign) * (t != 0) for s, t in zip(scales, taus, strict=True)]
    left = sum(e / sum(energies) * a for e, a in zip(energies, agree, strict=True))
    divisor = np.where(left > 0, left, 1) if mean else 1
    return sum(
        s * e / sum(energies) * t * a / divisor
        for s, e, t, a in zip(scales, energies, taus, agree, strict=True)
    )


def ram(taus, scales, epsilon=1e-5, r=0.0, alpha=0.2):
    marks = [np.abs(t) > epsilon for t in taus]
    count = sum(m.astype(int) for m in marks)
    total = np.zeros(taus[0].shape)
    for tau, scale, mark in zip(taus, scales, marks, strict=True):
        own, shared = (mark & (count == 1)).sum(), (mark & (count > 1)).sum()
        factor = 1 + r * min(shared / own if own else 0, alpha)
        total += np.where(count == 1, factor, 1 / np.maximum(count, 1)) * scale * tau * mark
    return total


def nearswap(taus, scales, t):
    return sum(
        s * np.where(np.abs(v) > t, t * np.sign(v), v) for s, v in zip(scales, taus, strict=True)
    )


CASES = {
    "tsv": (tsv, {}),
    "iso_c": (iso_c, {}),
    "iso_cts": (iso_cts, {}),
    "iso_cts half": (lambda t, s: iso_cts(t, s, 0.5), {"common_share": 0.5}),
    "sce": (sce, {}),
    "sce half": (lambda t, s: sce(t, s, 0.5), {"density": 0.5}),
    "sce all": (lambda t, s: sce(t, s, 1), {"density": 1}),
    "sce as mergekit": (
        lambda t, s: sce(t, s, 0.3, True, True, 0.02),
        {"density": 0.3, "merge": "mean", "share_of": "varying", "floor": 0.02}),
    "ram": (ram, {}),
    "ram coarse": (lambda t, s: ram(t, s, 0.05), {"epsilon": 0.05}),
    "ram_plus": (lambda t, s: ram(t, s, r=0.1), {}),
    "ram_plus more": (lambda t, s: ram(t, s, 0.05, 3, 1), {"epsilon": 0.05, "r": 3, "alpha": 1}),
    "nearswap": (lambda t, s: nearswap(t, s, 0.0001), {}),
    "nearswap far": (lambda t, s: nearswap(t, s, 0.05), {"t": 0.05}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scales", [SCALES, {"a": 1, "c": 1}, {"a": 0.5, "b": -2, "c": 1}], ids=str)
def test_formula(root, case, scales):
    formula, parameters = CASES[case]
    method = {"name": case.split()[0], **parameters}
    got = read_checkpoint(merged(root, method, scales))
    anchor, taus = vectors(root, scales)
    lambdas = [scales[t] for t in sorted(scales)]
    for name, start in anchor.items():
        expected = start + formula(taus[name], lambdas)
        np.testing.assert_allclose(got[name], expected, rtol=1e-11, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_float32_is_near(root, case):
    method = {"name": case.split()[0], **CASES[case][1]}
    double = read_checkpoint(merged(root, method, to="double"))
    single = read_checkpoint(merged(root, method, to="single", **SINGLE))
    for name, values in double.items():
        np.testing.assert_allclose(single[name], values, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("shape", [(40, 30), (7,), (5, 6, 7), (1, 9), (6, 1), (), (0, 3)], ids=str)
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_arcee_fusion(tmp_path, shape, scale):
    random = np.random.default_rng(3)
    before = random.normal(size=shape).astype("f4")
    after = (before + 0.3 * random.normal(size=shape)).astype("f4")
    for name, weights in {"anchor": before, "a": after}.items():
        write_checkpoint(tmp_path / name, {"w": weights}, "F32")
    got = read_checkpoint(merged(tmp_path, "arcee_fusion", {"a": scale}))["w"]
    tau = after.astype(float) - before
    expected = before + scale * tau * stands_out(before.astype(float), tau)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def stands_out(start, tau):
    if not tau.size:
        return np.ones(tau.shape)

    def softmax(x):
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True) if x.ndim else np.ones(())

    p, q = softmax(start + tau), softmax(start)
    divergence = (p * np.log(p / q)).sum(-1, keepdims=True) if tau.ndim else np.zeros(())
    importance = np.abs(tau) * divergence
    ordered = np.sort(importance.ravel())
    low, middle, high = (ordered[int(p * (ordered.size - 1))] for p in (0.25, 0.5, 0.75))
    return importance >= middle + 1.5 * (high - low)


def test_safety_arithmetic_subtracts_the_largest_tenth_of_the_model(root):
    got = read_checkpoint(merged(root, "safety_arithmetic", {"a": -0.5}))
    anchor, taus = vectors(root, {"a": 1})
    sizes = np.sort(np.concatenate([np.abs(t[0]).ravel() for t in taus.values()]))[::-1]
    cut = sizes[round(0.1 * sizes.size) - 1]
    for name, start in anchor.items():
        tau = taus[name][0]
        expected = start - 0.5 * tau * (np.abs(tau) >= cut)
        np.testing.assert_allclose(got[name], expected, rtol=1e-13, err_msg=name)


def test_a_step_of_its_own_for_each_task(root):
    data = {
        "anchor": "anchor",
        "tasks": {"a": {"model": "a", "t": 0.03}, "b": {"model": "b", "t": 0.07}},
        "method": "nearswap",
        "out": {"dtype": "float64", "precision": "float64"},
    }
    (root / "r.yaml").write_text(yaml.safe_dump(data))
    got = read_checkpoint(engine.run(load_recipe(root / "r.yaml"), root / "out").path)
    anchor, taus = vectors(root, {"a": 1, "b": 1})
    for name, start in anchor.items():
        first, second = taus[name]
        expected = start + nearswap([first], [1], 0.03) + nearswap([second], [1], 0.07)
        np.testing.assert_allclose(got[name], expected, rtol=1e-13)


@pytest.mark.parametrize("method", NAMES)
def test_a_task_of_scale_zero_is_as_if_it_were_not_there(root, method):
    without = read_raw(merged(root, method, {"a": 0.5, "b": -2}, to="without", **SINGLE))
    scales = {"a": 0.5, "b": -2, "c": 0}
    assert read_raw(merged(root, method, scales, to="with", **SINGLE)) == without


@pytest.mark.parametrize("method", [*NAMES, "arcee_fusion"])
def test_replay_gives_the_same_bits(root, method):
    out = merged(root, method, {"a": 0.5} if method == "arcee_fusion" else SCALES, **SINGLE)
    assert all(check.outcome == "same" for check in verify(out, replay=True))


@pytest.mark.parametrize("method", ["tsv", "iso_c", "iso_cts"])
def test_threads_of_blas_change_no_bit(tmp_path, method):
    """With more than one, a decomposition of this size has other last bits."""
    random = np.random.default_rng(0)
    for name in ("anchor", "a", "b"):
        write_checkpoint(tmp_path / name, {"w": random.normal(size=(300, 260))}, "F32")
    (tmp_path / "r.yaml").write_text(
        f"{{anchor: anchor, tasks: {{a: {{model: a, scale: 1}}, b: {{model: b, scale: 1}}}}, "
        f"method: {method}}}"
    )
    digests = set()
    for number in ("1", "2"):
        command = [sys.executable, "-m", "taskvec.cli.main", "merge", "r.yaml", f"out{number}"]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": number}
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
        content = (tmp_path / f"out{number}" / "model.safetensors").read_bytes()
        digests.add(hashlib.sha256(content).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize("method", NAMES)
def test_float16_near_its_largest_does_not_overflow_inside(tmp_path, method):
    random = np.random.default_rng(4)
    anchor = random.choice([-60_000.0, 60_000.0], (20, 18))
    write_checkpoint(tmp_path / "anchor", {"w": anchor}, "F16")
    for task in ("a", "b"):
        moved = anchor * (1 - 0.03 * random.random((20, 18)))
        write_checkpoint(tmp_path / task, {"w": moved}, "F16")
    single = read_checkpoint(merged(tmp_path, method, {"a": 1, "b": 1}, to="s", **SINGLE))
    double = read_checkpoint(merged(tmp_path, method, {"a": 1, "b": 1}, to="d"))
    np.testing.assert_allclose(single["w"], double["w"], rtol=1e-5)


def test_vectors_too_large_to_be_decomposed(tmp_path):
    random = np.random.default_rng(5)
    for name in ("anchor", "a", "b"):
        write_checkpoint(tmp_path / name, {"w": random.normal(size=(8, 8))}, "F32")
    with pytest.raises(OutputError, match="'w': its task vectors are too large to be decomposed"):
        merged(tmp_path, "iso_c", {"a": 3e38, "b": 1}, **SINGLE)
    assert not (tmp_path / "out").exists()


def test_weights_of_layers_scale_the_vectors(root):
    lata = {"name": "lata", "scheme": "linear"}
    out = merged(root, "tsv", {"a": 1.0, "b": 0.5}, base="c", layer_weights=lata)
    table = yaml.safe_load((out / "taskvec-manifest.json").read_text())["table"]["weights"]
    anchor, taus = vectors(root, {"a": 1, "b": 1})
    got = read_checkpoint(out)
    for name, start in anchor.items():
        weights = [table["a"][name], table["b"][name]]
        if 0 in weights and taus[name][0].ndim == 2:
            continue  # one task alone
        lambdas = [weights[0], 0.5 * weights[1]]
        np.testing.assert_allclose(got[name], start + tsv(taus[name], lambdas), rtol=1e-10)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("arcee_fusion", "arcee_fusion takes one task; got a, b"),
        ({"name": "sce", "density": 0.5}, "sce selects entries that vary across tasks; got one, b"),
    ],
)
def test_a_table_that_is_given_does_not_pass_by_what_a_method_refuses(root, method, message):
    scales = {"a": 0.0, "b": 1.0}
    merged(root, "task_arithmetic", scales, to="plain")
    table = decide_table(prepare(load_recipe(root / "plain.yaml")))
    data = yaml.safe_load((root / "plain.yaml").read_text()) | {"method": method}
    (root / "r.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ParameterError, match=message):
        engine.run(replace(load_recipe(root / "r.yaml"), table=table), root / "out")


PEAK = """
import sys, threading, time
from taskvec.merging.prepare import prepare
from taskvec.recipes.reading import load_recipe
from taskvec.streaming import RunOptions
from taskvec.outputs.run import run
from pathlib import Path

def anonymous():
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split("RssAnon:")[1].split()[0])

recipe, peak, done = load_recipe(Path("r.yaml")), [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
run(recipe, Path(sys.argv[1]), options=RunOptions(threads=int(sys.argv[2])))
done.set()
watcher.join()
print(peak[0], prepare(recipe, RunOptions(threads=int(sys.argv[2]))).estimate.peak_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("method", ["sce", "iso_c", "ram"])
@pytest.mark.parametrize("threads", ["1", "2"])
def test_the_memory_that_is_planned_is_not_far_off(tmp_path, method, threads):
    shape = (400, 5_000)
    random = np.random.default_rng(0)
    for name in ("anchor", "a", "b"):
        weights = {f"w{i}": random.normal(size=shape).astype("f4") for i in range(2)}
        write_checkpoint(tmp_path / name, weights, "BF16")
    (tmp_path / "r.yaml").write_text(
        f"{{anchor: anchor, tasks: {{a: {{model: a, scale: 1}}, b: {{model: b, scale: 1}}}}, "
        f"method: {method}}}"
    )
    command = [sys.executable, "-c", PEAK, "out", threads]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    measured, planned = map(int, done.stdout.split())
    assert measured < planned < 2.5 * measured
