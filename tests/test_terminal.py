from crate_kernels.terminal import count, in_bytes, printable


def test_control_characters_become_signs():
    assert printable("a\tb\nc") == "a\tb\nc"
    assert printable("\x1b[31mred\x07") == "\u241b[31mred\u2407"
    assert printable("\x7f\x9b0m\r") == "\u2421\ufffd0m\u240d"
    assert printable("naïve — 数") == "naïve — 数"


def test_one_thing_is_singular():
    assert [count(number, "shard") for number in (0, 1, 1112)] == ["0 shards", "1 shard", "1,112 shards"]


def test_small_files_are_not_nothing():
    assert [in_bytes(size) for size in (36_800, 999_400, 1_840_000)] == ["37 kB", "999 kB", "1.8 MB"]
