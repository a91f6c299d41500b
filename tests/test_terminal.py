from crate_kernels.terminal import printable


def test_control_characters_become_signs():
    assert printable("a\tb\nc") == "a\tb\nc"
    assert printable("\x1b[31mred\x07") == "\u241b[31mred\u2407"
    assert printable("\x7f\x9b0m\r") == "\u2421\ufffd0m\u240d"
    assert printable("naïve — 数") == "naïve — 数"
