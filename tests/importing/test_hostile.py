"""Files that would run code, exhaust memory or lie: refused, named, and without any effect."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posthoc_ema import (
    PosthocEMAError,
    SnapshotError,
    Uniform,
    UnsafePickleError,
    import_snapshots,
)
from posthoc_ema.errors import CorruptSnapshotError
from posthoc_ema.importing.pickle_data import read_pickle
from posthoc_ema.importing.region import Cursor, Region
from posthoc_ema.importing.torch_data import allowing
from tests.importing.memory import peak_of

NAME = "network-snapshot-0000008-0.050.pkl"


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def touch(path: Path) -> Call:
    return Call(os.system, f"touch {path}")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that appears if anything is executed."""
    return tmp_path / "executed"


def assert_refused(tmp_path: Path, content: bytes, what: str, mark: Path, name: str = NAME) -> None:
    folder = tmp_path / "source"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    profile = Uniform(1, relative=False)
    with pytest.raises(UnsafePickleError) as caught:
        import_snapshots(folder, tmp_path / "ema", profile=profile)
    text = str(caught.value)
    assert str(folder / name) in text
    assert what in text, text
    assert "nothing was executed" in text or "code" in text
    assert not mark.exists()
    assert not list((tmp_path / "ema").glob("*.safetensors"))


SYSTEM = f"{os.system.__module__}.system"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_calls_of_the_system(tmp_path: Path, mark: Path, protocol: int) -> None:
    for data in (touch(mark), {"ema": touch(mark)}, {"ema": [{"deep": (1, touch(mark))}]}):
        assert_refused(tmp_path, pickle.dumps(data, protocol), SYSTEM, mark)


@pytest.mark.parametrize(
    ("function", "args", "named"),
    [
        (eval, ("__import__('os').system('touch {}')",), "builtins.eval"),
        (exec, ("open('{}', 'w')",), "builtins.exec"),
        (open, ("{}", "w"), "io.open"),
        (getattr, (os, "system"), "builtins.getattr"),
        (__import__, ("os",), "builtins.__import__"),
        (compile, ("1", "x", "eval"), "builtins.compile"),
        (pickle.loads, (b"x",), "_pickle.loads"),
        (torch.load, ("{}",), "torch.serialization.load"),
        (os.unlink, ("{}",), "posix.unlink"),
        (Path.touch, (), "Path.touch"),
    ],
)
def test_calls_of_other_code(
    tmp_path: Path, mark: Path, function: Any, args: Any, named: str
) -> None:
    filled = tuple(a.format(mark) if isinstance(a, str) else a for a in args)
    if function is getattr:
        filled = (io, "open")  # modules cannot be pickled; the call is what counts
        content = b"cbuiltins\ngetattr\n(cio\nopen\nS'x'\ntR."
    else:
        content = pickle.dumps({"ema": Call(function, *filled)}, 4)
    assert_refused(tmp_path, content, named, mark)


def written(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        # Dotted names, which the pickle module follows through attributes.
        (written(text("torch"), text("serialization.os.system"), b"\x93"), "serialization.os"),
        (written(text("torch_utils.persistence"), text("os.system"), b"\x93"), "persistence.os."),
        (written(text("dnnlib.util"), text("EasyDict.__class__"), b"\x93"), "EasyDict.__class__"),
        (written(text("torch.nn.modules.linear"), text("os.system"), b"\x93"), "linear.os"),
        # Old operations: INST, OBJ, a name by the memo, extensions, things beside the file.
        (b"(S'touch x'\nios\nsystem\n.", "os.system"),
        (b"(cos\nsystem\nS'touch x'\no.", "os.system"),
        (b"cos\nsystem\np0\n0g0\n(S'x'\ntR.", "os.system"),
        (b"c__builtin__\neval\n(S'1'\ntR.", "builtins.eval"),
        (written(b"\x82\x01"), "the extension 1"),
        (written(b"\x83\x01\x00"), "the extension 1"),
        (written(b"\x84\x01\x00\x00\x00"), "the extension 1"),
        (b"Pfile:///etc/passwd\n.", "something outside of it (file:///etc/passwd)"),
        (written(text("../../etc/passwd"), b"Q"), "outside of it (../../etc/passwd)"),
        (b"\x80\x05\x97.", "buffers outside of it"),
        # As the state or the arguments of what is allowed.
        (written(b"ccollections\nOrderedDict\n)Rcos\nsystem\nb"), "os.system"),
        (written(b"ctorch.nn.modules.linear\nLinear\n)\x81cos\nsystem\nb"), "os.system"),
        (written(b"ctorch._utils\n_rebuild_parameter\ncos\nsystem\n\x85R"), "os.system"),
    ],
)
def test_names_by_every_way(tmp_path: Path, mark: Path, content: bytes, named: str) -> None:
    assert_refused(tmp_path, content, named, mark)


def storage_holding(payload: bytes) -> bytes:
    """A tensor whose storage is said to be in these bytes."""
    held = b"\x8e" + struct.pack("<Q", len(payload)) + payload
    return written(b"}", text("ema"), b"ctorch.storage\n_load_from_bytes\n", held, b"\x85R", b"s")


def test_code_inside_of_a_storage(tmp_path: Path, mark: Path) -> None:
    hostile = pickle.dumps(touch(mark), 2)
    assert_refused(tmp_path, storage_holding(hostile), SYSTEM, mark)
    begun = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001))
    begun += pickle.dumps({"little_endian": True}, 2)
    assert_refused(tmp_path, storage_holding(begun + hostile), SYSTEM, mark)
    padded = hostile[:2] + b"U" + b"\xff" + b"x" * 255 + b"0" + hostile[2:]  # a large one
    large = storage_holding(begun + padded + b"\x00" * 10000)
    assert_refused(tmp_path, large, SYSTEM, mark)
    nested = pickle.dumps(Call(torch.storage._load_from_bytes, hostile), 2)
    assert_refused(tmp_path, storage_holding(nested), "torch.storage._load_from_bytes", mark)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["step-100.pt", "0.100.pt", "step-100.ckpt", "step-100.bin"])
def test_code_in_a_file_of_torch_save(tmp_path: Path, mark: Path, legacy: bool, name: str) -> None:
    buffer = io.BytesIO()
    data = {"w": torch.ones(3), "x": touch(mark)}
    torch.save(data, buffer, _use_new_zipfile_serialization=not legacy)
    if name == "0.100.pt":
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / name).write_bytes(buffer.getvalue())
        with pytest.raises(UnsafePickleError, match=f"{name} refers to {SYSTEM}"):
            import_snapshots(tmp_path / "source", tmp_path / "ema", sigma_rel=[0.05])
    else:
        assert_refused(tmp_path, buffer.getvalue(), SYSTEM, mark, name)
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_an_archive_of_code(tmp_path: Path, mark: Path) -> None:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), buffer)
    assert_refused(tmp_path, buffer.getvalue(), "TorchScript", mark, "step-100.pt")


def test_a_whole_module(tmp_path: Path, mark: Path) -> None:
    """What torch.save(model) writes: classes of layers, which only EDM2 pickles may name."""
    buffer = io.BytesIO()
    torch.save(torch.nn.Linear(2, 2), buffer)
    what = "torch.nn.modules.linear.Linear"
    assert_refused(tmp_path, buffer.getvalue(), what, mark, "step-100.pt")


def test_allowed_by_name_it_is_data_all_the_same(tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    torch.save({"w": torch.ones(3), "v": torch.ones(2), "x": touch(mark)}, folder / "step-1.pt")
    done = import_snapshots(
        folder, tmp_path / "ema", profile=Uniform(1, relative=False), allow=[SYSTEM]
    )
    assert list(done.snapshots[0].averages) == ["w", "v"]
    assert not mark.exists()


# Claims ---------------------------------------------------------------------------------------

CLAIMS = [
    b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60),  # bytes
    b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60),  # text
    b"\x80\x05\x96" + struct.pack("<Q", 1 << 60),
    b"\x80\x02\x8b" + struct.pack("<I", (1 << 32) - 1),  # an integer of four billion bytes
    b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.",  # a frame: without effect
    b"\x80\x02Nr" + struct.pack("<I", (1 << 32) - 1) + b"0.",  # a memo of four billion places
    b"\x80\x02B\xff\xff\xff\xff",
    b"I" + b"9" * 900 + b"\n.",
    b"(" * 10000 + b".",
    b"\x80\x02" + b"]" + b"2a" * 5000 + b".",  # a list that holds itself
    b"\x80\x02}" + b"]q\x00h\x00a" + b".",
    b"\x80\x02)" + b"\x85" * 50000 + b".",  # as deep as it likes
    b"\x80\x02)" + b"\x85" * 50000 + b"Q.",
]


@pytest.mark.parametrize("number", range(len(CLAIMS)))
def test_claims_cost_nothing(tmp_path: Path, number: int) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / NAME).write_bytes(CLAIMS[number])

    def attempt() -> None:
        with pytest.raises(PosthocEMAError, match=NAME):
            import_snapshots(folder, tmp_path / "ema")

    attempt()  # what is loaded once does not count
    # Far below what is claimed, far above what 100 kB of nested tuples take.
    assert peak_of(attempt) < 50e6


def copies(argument: bytes, name: bytes, rest: bytes = b"\x85R") -> bytes:
    """One large thing, given to many calls."""
    return b"\x80\x04" + argument + b"q\x000c" + name + b"q\x010(" + rest * 3000 + b"t."


def doubled(first: bytes, join: bytes) -> bytes:
    """A thing that holds the one before it twice, sixty times over."""
    parts = [first + b"q\x00"]
    parts += [join.replace(b"?", bytes([k - 1])) + b"q" + bytes([k]) for k in range(1, 60)]
    return b"\x80\x04" + b"0".join(parts)


ITEMS = b"(" + b"K\x01" * 30000 + b"t"
LINEAR = b"ctorch.nn.modules.linear\nLinear\n"
INNER = LINEAR + b")\x81}" + text("_modules") + b"}(" + text("a") + b"h?" + text("b") + b"h?usb"
BOMBS = {
    "tuples": (doubled(b")", b"h?h?\x86") + b"Q.", "outside of it (a tuple)"),
    "lists": (doubled(b"]", b"](h?h?e") + b"Q.", "outside of it (a list)"),
    "calls": (doubled(LINEAR + b")\x81", LINEAR + b"h?h?\x86\x81") + b"Q.", "(a Record)"),
    "modules": (
        doubled(LINEAR + b")\x81", INNER) + b"0}" + text("ema") + b"h\x3bs.",
        "more modules, or longer names, than any network",
    ),
    "list": (copies(ITEMS, b"builtins\nlist\n", b"h\x01h\x00\x85R"), "many times what the file"),
    "size": (copies(ITEMS, b"torch\nSize\n", b"h\x01h\x00\x85R"), "many times what the file"),
    "arguments": (copies(ITEMS, b"torch\nSize\n", b"h\x01h\x00R"), "a call of 30000 arguments"),
    "operations": (b"\x80\x04(" + b"N" * 3000 + b"l.", "more than 2000 operations"),
    "keys": (b"\x80\x04}\x8a\x20" + b"\x7f" * 32 + b"Ns.", "a number of 255 bits cannot be a key"),
    "keywords": (b"\x80\x04ccollections\nOrderedDict\n)K\x05\x92.", "keywords are no mapping"),
    "buffers": (
        b"\x80\x04}" + text("ema") + LINEAR + b")\x81}" + text("_non_persistent_buffers_set")
        + b"K\x05sbs.",
        "damaged buffers",
    ),
}  # fmt: skip
"""Small files that would take all memory, or forever, if they were followed; or trip a reader."""


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "operations":
        monkeypatch.setattr("posthoc_ema.importing.pickle_data._MOST_OPERATIONS", 2000)
    content, message = BOMBS[name]
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / NAME).write_bytes(content)

    def attempt() -> None:
        with pytest.raises(PosthocEMAError) as caught:
            import_snapshots(folder, tmp_path / "ema")
        assert NAME in str(caught.value)
        assert message in str(caught.value)

    # A few copies of what the file holds, where 3000 of them would be 700 MB.
    assert peak_of(attempt) < 20e6
    assert not (tmp_path / "ema").exists()


def test_nothing_is_written_where_one_of_several_is_refused(tmp_path: Path, mark: Path) -> None:
    """The files before it are good; the folder, old or new, stays as it was."""
    folder = tmp_path / "source"
    folder.mkdir()
    raw = Uniform(1, relative=False)
    for step in (1, 2):
        torch.save({"w": torch.ones(3)}, folder / f"step-{step}.pt")
    import_snapshots(folder, tmp_path / "old", profile=raw)
    before = {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir() if p.is_file()}
    torch.save({"w": torch.ones(3)}, folder / "step-3.pt")
    torch.save({"w": torch.ones(3), "x": touch(mark)}, folder / "step-4.pt")
    for out in ("old", "new"):
        with pytest.raises(UnsafePickleError, match=r"step-4\.pt refers to"):
            import_snapshots(folder, tmp_path / out, profile=raw)
    assert {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir() if p.is_file()} == before
    assert not (tmp_path / "new").exists()
    assert not mark.exists()


def test_views_of_the_same_bytes(tmp_path: Path) -> None:
    """They would fill a disk: each is written as a tensor of its own."""
    (tmp_path / "source").mkdir()
    whole = torch.zeros(100_000)
    state = {str(n): whole[: len(whole) - n] for n in range(40)}
    torch.save(state, tmp_path / "source" / "step-1.pt")
    with pytest.raises(CorruptSnapshotError, match=r"step-1\.pt has tensors of many times the byt"):
        import_snapshots(tmp_path / "source", tmp_path / "ema", profile=Uniform(1, relative=False))


@pytest.mark.parametrize("name", ["__metadata__", "half\ud800", ""])
def test_names_that_no_file_holds(tmp_path: Path, name: str) -> None:
    (tmp_path / "source").mkdir()
    torch.save({name: torch.ones(2)}, tmp_path / "source" / "step-1.pt")
    with pytest.raises(CorruptSnapshotError, match=r"step-1\.pt has a tensor called"):
        import_snapshots(tmp_path / "source", tmp_path / "ema", profile=Uniform(1, relative=False))


def test_storages_that_are_not_behind_the_pickle(tmp_path: Path) -> None:
    """The old format, with an empty list of those that are."""
    (tmp_path / "source").mkdir()
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2)}, buffer, _use_new_zipfile_serialization=False)
    data = buffer.getvalue()
    end = data.rindex(b"\x80\x02")  # the list of keys
    (tmp_path / "source" / "step-1.pt").write_bytes(data[:end] + b"\x80\x02].")
    with pytest.raises(CorruptSnapshotError, match=r"step-1\.pt lacks the numbers of a tensor"):
        import_snapshots(tmp_path / "source", tmp_path / "ema", profile=Uniform(1, relative=False))


def tensor_file(path: Path, shape: Any, stride: Any, offset: Any, count: int = 4) -> None:
    """A file of torch.save whose one tensor claims what it likes of a storage of four numbers."""

    class Kept:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (
                Reference(), offset, shape, stride, False, collections.OrderedDict(),
            )  # fmt: skip

    class Reference:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if isinstance(obj, Reference):
                return ("storage", torch.FloatStorage, "0", "cpu", count)
            return None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"w": Kept()})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        archive.writestr("archive/data/0", bytes(16))


@pytest.mark.parametrize(
    "claim",
    [
        {"shape": (1 << 40,), "stride": (0,), "offset": 0},
        {"shape": (5,), "stride": (1,), "offset": 0},
        {"shape": (2,), "stride": (1,), "offset": 3},
        {"shape": (2,), "stride": (1,), "offset": -1},
        {"shape": (2, 2), "stride": (-2, 1), "offset": 2},
        {"shape": (-1,), "stride": (1,), "offset": 0},
        {"shape": (2,), "stride": (1, 1), "offset": 0},
        {"shape": (2.5,), "stride": (1,), "offset": 0},
        {"shape": (1 << 30,), "stride": (1,), "offset": 0, "count": 1 << 30},
        {"shape": None, "stride": (1,), "offset": 0},
        {"shape": (True,), "stride": (1,), "offset": 0},
        {"shape": (0, 1 << 61), "stride": (1, 1), "offset": 0},
        {"shape": (1,) * 65, "stride": (1,) * 65, "offset": 0},
        {"shape": (1 << 100000,) * 30, "stride": (1,) * 30, "offset": 0},
    ],
)
def test_tensors_that_cannot_be(tmp_path: Path, claim: Any) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    tensor_file(folder / "step-1.pt", **claim)
    with pytest.raises(CorruptSnapshotError, match=r"step-1\.pt"):
        import_snapshots(folder, tmp_path / "ema", profile=Uniform(1, relative=False))


def test_a_tensor_that_can_be(tmp_path: Path) -> None:
    """The same by the same hand, so that the refusals above are owed to the claims."""
    folder = tmp_path / "source"
    folder.mkdir()
    tensor_file(folder / "step-1.pt", shape=(2, 2), stride=(1, 2), offset=0)
    done = import_snapshots(folder, tmp_path / "ema", profile=Uniform(1, relative=False))
    assert done.snapshots[0].entries["w"].shape == (2, 2)


def test_a_module_that_holds_itself(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    module = b"ctorch.nn.modules.container\nModuleDict\n)\x81q\x01"
    state = b"}" + text("_modules") + b"}" + text("again") + b"h\x01ssb"
    (folder / NAME).write_bytes(written(b"}", text("ema"), module, state, b"s"))
    with pytest.raises(CorruptSnapshotError, match="holds itself"):
        import_snapshots(folder, tmp_path / "ema")


def test_paths_in_archives_and_indices_lead_nowhere(tmp_path: Path) -> None:
    folder = tmp_path / "source" / "step-1"
    folder.mkdir(parents=True)
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(b"x")
    index = '{"weight_map": {"w": "../../secret.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CorruptSnapshotError, match="which is not beside it"):
        import_snapshots(tmp_path / "source", tmp_path / "ema", profile=Uniform(1, relative=False))


@pytest.mark.parametrize(
    "length", [torch.empty(0), torch.tensor(float("nan")), torch.tensor(5.0), torch.tensor(5j)]
)
def test_lengths_that_cannot_be(tmp_path: Path, length: torch.Tensor) -> None:
    (tmp_path / "source").mkdir()
    state = {"ema_model.w": torch.ones(3), "sigma_rel": length}
    torch.save(state, tmp_path / "source" / "0.100.pt")
    with pytest.raises(SnapshotError, match=r"0\.100\.pt does not say its EMA length"):
        import_snapshots(tmp_path / "source", tmp_path / "ema")


@pytest.mark.parametrize("count", [torch.empty(0).half(), torch.tensor(1e30), torch.tensor(-1.0)])
def test_counts_that_cannot_be(tmp_path: Path, count: torch.Tensor) -> None:
    """They are those of batches, which are about the step."""
    (tmp_path / "source").mkdir()
    state = {"ema_model.w": torch.ones(3), "ema_model.num_batches_tracked": count}
    torch.save(state, tmp_path / "source" / "0.100.pt")
    (snapshot,) = import_snapshots(tmp_path / "source", tmp_path / "ema", sigma_rel=0.1).snapshots
    assert int(snapshot.read("num_batches_tracked").reshape(())) == 100


@pytest.mark.parametrize("name", [NAME, "0.100.pt", "step-100.pt", "step-100.safetensors"])
def test_pipes_are_not_waited_for(tmp_path: Path, name: str) -> None:
    (tmp_path / "source").mkdir()
    os.mkfifo(tmp_path / "source" / name)
    with pytest.raises(SnapshotError, match="is empty"):
        import_snapshots(tmp_path / "source", tmp_path / "ema")
    with pytest.raises(SnapshotError, match=f"{name} is no file or folder that exists"):
        import_snapshots([tmp_path / "source" / name], tmp_path / "ema")


def test_a_table_with_a_field_without_end(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("file,t\n" + "a" * 200_000 + ",1\n")
    with pytest.raises(SnapshotError, match=r"list\.csv cannot be read"):
        import_snapshots(tmp_path / "list.csv", tmp_path / "ema")


# Anything at all ------------------------------------------------------------------------------


def interpret(content: bytes, path: Path) -> Any:
    return read_pickle(Cursor(Region(path, 0, len(content), content)), allowing())


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=50)
    | st.binary(max_size=50),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner)
    | st.tuples(inner, inner) | st.sets(st.integers(-(2**63), 2**63), max_size=4),
)  # fmt: skip


@given(PLAIN, st.integers(2, pickle.HIGHEST_PROTOCOL))
def test_plain_data_is_what_pickle_makes_of_it(data: Any, protocol: int) -> None:
    assert interpret(pickle.dumps(data, protocol), Path("x.pkl")) == data


@given(st.binary(max_size=200))
def test_any_bytes_are_data_or_an_error_of_ours(content: bytes) -> None:
    try:
        interpret(content, Path("x.pkl"))
    except PosthocEMAError as error:
        if "x.pkl" not in str(error):
            raise AssertionError(f"{error} does not name the file") from error


@given(PLAIN, st.integers(0, 5), st.data())
def test_any_damage_is_data_or_an_error_of_ours(
    value: Any, protocol: int, data: st.DataObject
) -> None:
    content = bytearray(pickle.dumps(value, protocol))
    for _ in range(3):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    test = bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        interpret(test, Path("x.pkl"))
    except PosthocEMAError as error:
        if "x.pkl" not in str(error):
            raise AssertionError(f"{error} does not name the file") from error
