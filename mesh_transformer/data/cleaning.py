"""Cleaning text before it is tokenised: broken encodings, and the spacing of WikiText."""

from __future__ import annotations

import re

# WikiText separates punctuation from words by spaces and writes "@-@" inside numbers and compounds.
# The order matters, and some rules go beyond their purpose (" N " was a number once); they are what
# published WikiText results were computed with. The known rule for "' 90s" is missing, since as
# published it never applies.
_WIKITEXT = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        ("s '", "s'"),
        (" @-@ ", "-"),
        (" @,@ ", ","),
        (r" @\.@ ", "."),
        (" : ", ": "),
        (" ; ", "; "),
        (r" \. ", ". "),
        (" ! ", "! "),
        (r" \? ", "? "),
        (" , ", ", "),
        (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
        (r"\[\s*([^]]*?)\s*\]", r"[\1]"),
        (r"{\s*([^}]*?)\s*}", r"{\1}"),
        (r'"\s*([^"]*?)\s*"', r'"\1"'),
        (r"'\s*([^']*?)\s*'", r"'\1'"),
        ("= = = =", "===="),
        ("= = =", "==="),
        ("= =", "=="),
        (" ° ", "°"),
        (" \n", "\n"),
        ("\n ", "\n"),
        (" N ", " 1 "),
        (" 's", "'s"),
    )
)


def fix_encoding(text: str) -> str:
    """Repair mojibake and normalise to NFKC, by ftfy."""
    import ftfy

    return ftfy.fix_text(text, normalization="NFKC")


def detokenize_wikitext(text: str) -> str:
    """Undo the spacing of WikiText, by the rules that language-model evaluations share."""
    for pattern, replacement in _WIKITEXT:
        text = pattern.sub(replacement, text)
    return text
