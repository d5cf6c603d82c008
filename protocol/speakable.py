"""Whether a text holds anything to speak: one rule for the relay and all speech engines."""

import unicodedata

#: Signs that are read out as words though Unicode has them as punctuation.
_READ = frozenset("%‰&@#§")
#: Letters and symbols without a shape or a name: fillers, the blank of Braille, what stands for lost characters.
_BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0\ufffc\ufffd")
_BOX_DRAWING = range(0x2500, 0x25A0)


def speakable(text: str, *, symbols: bool = True) -> bool:
    """Whether `text` has a letter, a digit or a symbol that is read out, of any script.

    Args:
        text: what is to be spoken.
        symbols: whether the engine reads symbols ("+", "€", "☃") out; most models speak words alone.
    """
    return any(_is_read(char, symbols) for char in text)


def _is_read(char: str, symbols: bool) -> bool:
    if char.isalnum():
        return char not in _BLANK
    if not symbols or char in _BLANK or ord(char) in _BOX_DRAWING:
        return False
    return char in _READ or unicodedata.category(char) in ("Sm", "Sc", "So")
