"""Data of every format, and what is said of data that cannot be read."""

import gzip
import json
import sys
import types

import numpy as np
import pytest

pytest.importorskip("torch")

from taskvec.errors import DataError, UsageError
from taskvec.training.data import (
    Classified,
    Conversations,
    Documents,
    Reading,
    hold_out,
    limit_data,
    number_classes,
    read_data,
)


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refusal(source, reading=Reading(), kind=DataError):
    with pytest.raises(kind) as caught:
        read_data(source, reading)
    return str(caught.value)


def test_running_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    data = read_data(tmp_path / "a.txt")
    assert isinstance(data, Documents)
    assert data.items == ["one\ntwo"]
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(b"zipped"))
    assert read_data(packed).items == ["zipped"]
    rows = lines(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    assert read_data(rows).items == ["one", "two"]


@pytest.mark.parametrize(
    ("prompt", "response"),
    [("prompt", "response"), ("question", "answer"), ("instruction", "output")],
)
def test_pairs(tmp_path, prompt, response):
    path = lines(tmp_path / "a.jsonl", {prompt: "why", response: "so"})
    data = read_data(path)
    assert isinstance(data, Conversations)
    assert data.items == [(("user", "why"), ("assistant", "so"))]
    assert data.places == [f"{path}, line 1"]


def test_fields_of_other_names(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"in": "why", "out": "so"})
    assert refusal(path, kind=UsageError) == (
        f"{path}: no known combination of fields (in, out); name them, for example "
        "--fields prompt=NAME,response=NAME"
    )
    data = read_data(path, Reading(fields={"prompt": "in", "response": "out"}))
    assert data.items == [(("user", "why"), ("assistant", "so"))]
    assert refusal(path, Reading(fields={"ask": "in"}), UsageError) == (
        "fields: unknown 'ask'; use messages, prompt, response, text, image, label"
    )


def test_messages(tmp_path):
    path = lines(
        tmp_path / "a.jsonl",
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]},
    )
    assert read_data(path).items == [
        (("user", "a"), ("assistant", "b")),
        (("user", "c"), ("assistant", "d")),
    ]


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ("hi", "messages must be a list of objects with a role and a content"),
        ([{"role": "user"}], "messages must be a list of objects with a role and a content"),
        (
            [{"role": "user", "content": "a"}],
            "no message is of the assistant, so nothing is learned",
        ),
    ],
)
def test_messages_that_are_none(tmp_path, messages, text):
    path = lines(tmp_path / "a.jsonl", {"messages": messages})
    assert refusal(path) == f"{path}, line 1: {text}"


def test_a_row_without_its_field(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"prompt": "a", "response": "b"}, {"prompt": "a"})
    assert refusal(path) == (
        f"{path}, line 2: has no 'response' or 'completion' or 'answer' or 'output'; "
        "its fields: prompt"
    )


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_labelled_texts(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    mark = {".csv": ",", ".tsv": "\t"}.get(suffix)
    rows = [("good film", "pos"), ("bad film", "neg"), ("fine", "pos")]
    if mark is None:
        lines(path, *({"sentence": text, "label": label} for text, label in rows))
    else:
        path.write_text("\n".join(mark.join(row) for row in [("sentence", "label"), *rows]))
    data = read_data(path)
    assert isinstance(data, Classified)
    assert (data.kind, data.classes) == ("text", ("neg", "pos"))
    assert list(zip(data.items, data.labels, strict=True)) == [
        ("good film", 1), ("bad film", 0), ("fine", 1),
    ]  # fmt: skip


def test_labels_of_whole_numbers_stand_for_themselves(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"text": "a", "label": 2}, {"text": "b", "label": 0})
    data = read_data(path)
    assert (data.labels, data.classes) == ([2, 0], ("0", "1", "2"))
    assert refusal(lines(path, {"text": "a", "label": 12345678})) == (
        f"{path}: a label is 12345678; labels are numbers of classes"
    )
    assert refusal(lines(path, {"text": "a", "label": None})) == (
        f"{path}, line 1: 'label' must be a label, a number or a text"
    )


def test_lines_of_labels_and_texts(tmp_path):
    path = tmp_path / "words.all"
    path.write_bytes("1 good  film\n0 bad\n\n1 café\n".encode("latin-1"))
    assert refusal(path, kind=UsageError) == (
        f"{path}: unknown format; give --format text | chat | classes | lines | folder | npz | idx"
    )
    data = read_data(path, Reading("lines"))
    assert (data.items, data.labels) == (["good  film", "bad", "café"], [1, 0, 1])
    path.write_text("1 good\n1\n")
    assert refusal(path, Reading("lines")) == f"{path}, line 2: must be a label, a space and a text"


def picture(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_images_in_folders(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name, shape in (("cat", (5, 4, 3)), ("ant", (6, 3))):
        (tmp_path / name / "more").mkdir(parents=True)
        image.fromarray(picture(shape)).save(tmp_path / name / "more" / "1.png")
    data = read_data(tmp_path)
    assert (data.kind, data.classes, data.labels) == ("image", ("ant", "cat"), [0, 1])
    np.testing.assert_array_equal(data.items[0], picture((6, 3)))
    np.testing.assert_array_equal(data.items[1], picture((5, 4, 3)))
    (tmp_path / "cat" / "2.jpg").write_bytes(b"no image")
    data = read_data(tmp_path)
    with pytest.raises(DataError) as caught:
        data.items[1]
    assert str(caught.value).startswith(f"{tmp_path}/cat/2.jpg: cannot be read as an image: ")
    (tmp_path / "dog").mkdir()
    assert refusal(tmp_path) == f"{tmp_path}: class 'dog' holds no images"


def test_a_folder_without_images(tmp_path):
    assert refusal(tmp_path) == (
        f"{tmp_path}: holds no images; expected a folder for each class, with images"
    )


def test_npz(tmp_path):
    path = tmp_path / "a.npz"
    images, labels = picture((3, 5, 4, 3)), np.array([2, 0, 1])
    np.savez(path, train_x=images, train_y=labels, classes=np.array(["a", "b", "c"]),
             test_x=images[:1], test_y=labels[:1])  # fmt: skip
    data = read_data(path)
    assert (data.labels, data.classes) == ([2, 0, 1], ("a", "b", "c"))
    np.testing.assert_array_equal(data.items[2], images[2])
    test = read_data(path, Reading(fields={"image": "test_x", "label": "test_y"}))
    assert test.labels == [2]
    assert refusal(path, Reading(fields={"image": "x"})) == (
        f"{path}: has no array 'x'; it has train_x, train_y, classes, test_x, test_y: "
        "name one with --fields image=NAME"
    )


@pytest.mark.parametrize(
    ("images", "labels", "classes", "text"),
    [
        (picture((3, 5)), [0] * 3, None, "images must be uint8, (n, height, width) or (n, height, "
         "width, 3); got uint8 of shape (3, 5)"),
        (picture((3, 5, 4, 2)), [0] * 3, None, "images must be uint8, (n, height, width) or (n, "
         "height, width, 3); got uint8 of shape (3, 5, 4, 2)"),
        (np.ones((3, 5, 4)), [0] * 3, None, "images must be uint8, (n, height, width) or (n, "
         "height, width, 3); got float64 of shape (3, 5, 4)"),
        (picture((3, 5, 4)), [0] * 2, None, "labels must be 3 whole numbers; got int64 of shape "
         "(2,)"),
        (picture((3, 5, 4)), [0, -1, 0], None, "a label is -1"),
        (picture((3, 5, 4)), [0, 2, 0], ["a", "b"], "a label is 2; there are 2 classes"),
    ],
)  # fmt: skip
def test_npz_that_cannot_be_meant(tmp_path, images, labels, classes, text):
    more = {} if classes is None else {"classes": np.array(classes)}
    np.savez(tmp_path / "a.npz", x=images, y=np.array(labels), **more)
    assert refusal(tmp_path / "a.npz") == f"{tmp_path}/a.npz: {text}"


def test_npz_that_is_damaged(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04nothing")
    assert refusal(tmp_path / "a.npz").startswith(f"{tmp_path}/a.npz: cannot be read: ")


def idx(array):
    shape = b"".join(side.to_bytes(4, "big") for side in array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


@pytest.mark.parametrize("packed", [False, True])
def test_idx(tmp_path, packed):
    images = picture((3, 5, 4))
    suffix, pack = (".gz", gzip.compress) if packed else ("", bytes)
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    path.write_bytes(pack(idx(images)))
    labels = tmp_path / f"train-labels-idx1-ubyte{suffix}"
    assert refusal(path) == (f"{path}: its labels are missing; expected {labels.name} beside it")
    labels.write_bytes(pack(idx(np.array([1, 0, 1], np.uint8))))
    data = read_data(path)
    assert data.labels == [1, 0, 1]
    np.testing.assert_array_equal(data.items, images)
    path.write_bytes(pack(idx(images)[:-1]))
    assert refusal(path) == f"{path}: holds 59 bytes; its header says 60"
    path.write_bytes(pack(b"text"))
    assert refusal(path) == f"{path}: is not an idx file of bytes"


def test_a_data_set_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, config, split, trust_remote_code):
        assert trust_remote_code is False
        asked.append((name, config, split))
        if name == "no/such":
            raise FileNotFoundError("it is not there")
        return [{"sentence": "a", "label": 1, "idx": 0}, {"sentence": "b", "label": 0, "idx": 1}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = read_data("hub:glue:sst2")
    assert (data.items, data.labels) == (["a", "b"], [1, 0])
    read_data("hub:org/name:some:test")
    assert asked == [("glue", "sst2", "train"), ("org/name", "some", "test")]
    assert refusal("hub:no/such") == (
        "data set no/such, split train cannot be loaded from the hub: it is not there; or give "
        "local files by --data"
    )
    for source in ("hub:", "hub:a:b:c:d"):
        text = refusal(source, kind=UsageError)
        assert text == f"{source}: must be hub:NAME[:CONFIG[:SPLIT]]"


def test_images_of_the_hub(monkeypatch):
    image = pytest.importorskip("PIL.Image")
    rows = [{"img": image.fromarray(picture((4, 4, 4))), "label": 3}]
    loaded = types.SimpleNamespace(load_dataset=lambda *_, **__: rows)
    monkeypatch.setitem(sys.modules, "datasets", loaded)
    data = read_data("hub:cifar")
    assert (data.kind, data.labels, data.items[0].shape) == ("image", [3], (4, 4, 3))


def test_what_is_not_there_or_empty(tmp_path):
    assert refusal(tmp_path / "no.txt") == f"{tmp_path}/no.txt: no such file or folder"
    (tmp_path / "a.jsonl").write_text("\n")
    assert refusal(tmp_path / "a.jsonl") == f"{tmp_path}/a.jsonl: holds no examples"
    (tmp_path / "a.csv").write_text("text,label\n")
    assert refusal(tmp_path / "a.csv") == f"{tmp_path}/a.csv: holds no examples"


def test_formats_that_do_not_fit(tmp_path):
    assert refusal(tmp_path, Reading("xml"), UsageError) == (
        "format must be one of text, chat, classes, lines, folder, npz, idx; got 'xml'"
    )
    assert refusal(tmp_path, Reading("chat")) == (
        f"{tmp_path}: is a folder, which cannot be read as chat; give a file"
    )


def test_a_limit_draws_by_the_seed():
    data = Documents([f"{i}" for i in range(20)], "t", "d")
    one, again, other = limit_data(data, 5, 1), limit_data(data, 5, 1), limit_data(data, 5, 2)
    assert one == again
    assert set(one.items) != set(other.items)
    assert one.items == sorted(one.items, key=int)
    assert one.digest not in (data.digest, other.digest)
    assert limit_data(data, 20, 1) is data
    with pytest.raises(UsageError, match="limit must be above 0; got 0"):
        limit_data(data, 0, 1)


def test_a_share_is_held_out():
    data = Classified(list("abcdefghij"), list(range(10)), tuple("0123456789"), "text", "t", "d")
    train, validation = hold_out(data, 0.2, 3)
    assert sorted(train.items + validation.items) == data.items
    assert len(validation.items) == 2
    assert [data.items[i] for i in validation.labels] == validation.items
    for share in (0.0, 1.0, 2.0):
        with pytest.raises(UsageError) as caught:
            hold_out(data, share, 3)
        assert str(caught.value) == f"a share for validation must be between 0 and 1; got {share}"
    with pytest.raises(DataError, match="t: has too few examples to hold out 1% of them"):
        hold_out(data, 0.01, 3)


def test_names_of_classes_are_in_order():
    assert number_classes(["b", "a", "1"], "t") == ([2, 1, 0], ("1", "a", "b"))
