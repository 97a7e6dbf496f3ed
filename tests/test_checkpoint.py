"""Checkpoints: what comes back is bit for bit what was saved, or one line that names the file."""

import gc
import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_files import files_of_at_most

from xpo_jax import checkpoint
from xpo_jax.checkpoint import MANIFEST, CheckpointError, latest, restore, save, verify
from xpo_jax.values import TrainState

BITS = {2: np.uint16, 4: np.uint32}


def make_state(seed=0):
    """Leaves whose bits are easily lost: bfloat16, -0.0, NaNs with a payload, and an optax chain."""
    rng = np.random.default_rng(seed)
    params = {
        "layers": {"q": {"kernel": jnp.asarray(rng.normal(size=(2, 8, 4)), jnp.float32)}},
        "norm": jnp.asarray(rng.normal(size=8), jnp.bfloat16),
        "zeros": jnp.full((4,), -0.0),
        "nans": jnp.asarray(np.array([0x7FC00001, 0xFFC12345, 1], np.uint32).view(np.float32)),
    }
    transform = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.linear_schedule(0.0, 1.0, 10), mu_dtype=jnp.bfloat16),
    )
    state = TrainState(jnp.int32(7), np.int32(1), params, transform.init(params))
    return state._replace(opt_state=jax.tree.map(lambda x: x + x.dtype.type(3), state.opt_state))


def abstract(state, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def assert_bits_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.array_equal(x.view(BITS[x.itemsize]), y.view(BITS[y.itemsize]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    save(path, 7, make_state(), {"queries": 12, "best": [0.1, None]})
    return path


@pytest.fixture
def path(saved, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return tmp_path


def failure(call, *arguments):
    with pytest.raises(CheckpointError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_round_trip(saved):
    state = make_state()
    back, extra = restore(saved, 7, abstract(state))
    assert_bits_equal(back, state)
    assert extra == {"queries": 12, "best": [0.1, None]}
    assert latest(saved) == 7


def test_round_trip_into_shardings(saved):
    """Saved from one device, restored over two; saved from there, restored on one."""
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    like = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=over if a.shape[:1] == (2,) else whole),
        abstract(make_state()),
    )
    back, _ = restore(saved, 7, like)
    assert_bits_equal(back, make_state())
    assert all(
        b.sharding == a.sharding for a, b in zip(jax.tree.leaves(like), jax.tree.leaves(back), strict=True)
    )
    kernel = back.params["layers"]["q"]["kernel"]
    assert [shard.data.shape for shard in kernel.addressable_shards] == [(1, 8, 4), (1, 8, 4)]


def test_sharded_save(tmp_path):
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    state = make_state()
    params = {**state.params, "norm": jax.device_put(state.params["norm"], over)}
    save(tmp_path, 0, state._replace(params=params), {})
    assert_bits_equal(restore(tmp_path, 0, abstract(state))[0], state)


def test_the_manifest_is_what_sha256sum_reads(saved):
    folder = saved / "7"
    lines = (folder / MANIFEST).read_text().splitlines()
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    assert {line[66:] for line in lines} == present and "checkpoint.json" in present
    for line in lines:
        assert line[:66] == hashlib.sha256((folder / line[66:]).read_bytes()).hexdigest() + "  "


def test_any_flipped_bit_is_found(path):
    folder = path / "7"
    for name in [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]:
        whole = (folder / name).read_bytes()
        if not whole:
            continue
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 16
        (folder / name).write_bytes(damaged)
        message = failure(verify, path, 7)
        if name != MANIFEST:  # which makes some other file look wrong
            assert message == (
                f"{folder / name}: is damaged (its SHA-256 differs); delete that checkpoint to use an older one"
            )
        assert failure(restore, path, 7, abstract(make_state())) == message
        (folder / name).write_bytes(whole)
    verify(path, 7)


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_truncated_missing_foreign_and_no_manifest(path):
    folder = path / "7"
    file = largest(folder / "state")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert failure(verify, path, 7).startswith(f"{file}: is damaged (its SHA-256 differs); ")
    file.unlink()
    assert failure(verify, path, 7).startswith(f"{file}: is missing; delete that checkpoint")
    file.write_bytes(whole)
    (folder / "state" / "notes.txt").touch()
    assert failure(verify, path, 7).startswith(
        f"{folder}/state/notes.txt: is not a file of this checkpoint; remove it"
    )
    (folder / "state" / "notes.txt").unlink()
    verify(path, 7)
    lines = (folder / MANIFEST).read_text().splitlines(keepends=True)
    (folder / MANIFEST).write_text("".join(lines[:-1]))
    assert "is not a file of this checkpoint" in failure(verify, path, 7)
    (folder / MANIFEST).unlink()
    assert failure(restore, path, 7, abstract(make_state())) == (
        f"{folder / MANIFEST}: is missing, so nothing vouches for it; delete that checkpoint to use an older one"
    )


def test_latest_passes_over_what_does_not_verify(path, caplog):
    shutil.copytree(path / "7", path / "8")
    (path / "8" / "checkpoint.json").write_text("{}")
    (path / "10").mkdir()
    (path / "notes").mkdir()
    (path / "99").touch()
    assert latest(path) == 7
    assert [message.split(":")[0] for message in caplog.messages] == [
        "checkpoint 10 is passed over",
        "checkpoint 8 is passed over",
    ]
    assert str(path / "8" / "checkpoint.json") in caplog.messages[1]
    assert latest(path / "none") is None


def test_the_checkpoint_of_another_step(path):
    (path / "7").rename(path / "8")
    assert failure(restore, path, 8, abstract(make_state())) == (
        f"{path}/8: is not the checkpoint of step 8; put back the right folder"
    )


def test_other_dtypes_shapes_and_leaves_are_refused(saved):
    like = abstract(make_state())

    def message(**change):
        return failure(restore, saved, 7, like._replace(params={**like.params, **change}))

    def leaf(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=like.step.sharding)

    beginning = f"{saved}/7: does not fit this model or optimizer "
    assert message(norm=leaf((8,), jnp.float32)) == (
        beginning + "(params/norm is bfloat16[8] there, float32[8] here); use its config"
    )
    assert "(params/norm is bfloat16[8] there, bfloat16[4,2] here)" in message(
        norm=leaf((4, 2), jnp.bfloat16)
    )
    assert "(params/more is absent there, float32[] here)" in message(more=leaf((), jnp.float32))
    without = {name: leaf for name, leaf in like.params.items() if name != "norm"}
    assert "(params/norm is bfloat16[8] there, absent here)" in failure(
        restore, saved, 7, like._replace(params=without)
    )
    other = abstract(optax.sgd(0.1, momentum=0.9).init(make_state().params))
    assert failure(restore, saved, 7, like._replace(opt_state=other)).endswith(" more); use its config")
    bare = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), like)
    assert failure(restore, saved, 7, bare).endswith(
        "7: no sharding is given for step; give one for each leaf"
    )


# Orbax closes its event loop while writes of other arrays still fail; Python 3.12 mentions each.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_failed_write_is_one_line_and_leaves_nothing(tmp_path, capfd, caplog):
    state = make_state()
    big = state._replace(
        params={"w": jnp.asarray(np.random.default_rng(0).normal(size=(100, 100)), jnp.float32)}
    )
    with files_of_at_most(20_000):
        message = failure(save, tmp_path, 3, big, {})
    assert message.startswith(f"{tmp_path}/3: cannot be saved (") and "File too large" in message
    assert message.endswith("; free space or mend the rights")
    assert list(tmp_path.iterdir()) == []
    gc.collect()  # errors that nobody took are reported when they are collected
    assert capfd.readouterr().err == "" and caplog.messages == []
    (tmp_path / "file").touch()
    assert "Not a directory" in failure(save, tmp_path / "file", 3, state, {})
    assert "not JSON compliant" in failure(save, tmp_path, 3, state, {"best": float("nan")})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_saving_again(path):
    state = make_state(1)
    assert (
        failure(save, path, 7, state, {}) == f"{path}/7: is there already; delete it to save that step again"
    )
    assert_bits_equal(restore(path, 7, abstract(state))[0], make_state(0))
    (path / "7" / MANIFEST).unlink()  # as after a kill
    assert save(path, 7, state, {"a": 1}) == path / "7"
    back, extra = restore(path, 7, abstract(state))
    assert_bits_equal(back, state)
    assert extra == {"a": 1}
    assert json.loads((path / "7" / "checkpoint.json").read_text())["leaves"]["params/norm"] == "bfloat16[8]"


def test_the_manifest_is_written_last(tmp_path, monkeypatch):
    def killed(path, text):
        if path.name == MANIFEST:
            raise KeyboardInterrupt
        path.write_text(text)

    monkeypatch.setattr(checkpoint, "atomic_write", killed)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 3, make_state(), {})
    assert (tmp_path / "3" / "state").is_dir() and (tmp_path / "3" / "checkpoint.json").is_file()
    assert latest(tmp_path) is None
