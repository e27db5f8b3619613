"""Writes openai_clip_ids.json: ids of OpenAI's tokenizer for texts of each kind, by the copy of it in open_clip_torch.

    python tests/text/record_openai_clip_ids.py FOLDER

FOLDER is an unpacked wheel of open_clip_torch 3.3.0. Its SimpleTokenizer with clean="lower" does what
clip/simple_tokenizer.py of openai/CLIP does before it splits a text: basic_clean (ftfy.fix_text, html.unescape twice,
strip), then whitespace_clean, then lower. Merges that no text needs are left out, so that the file is small.
"""

import importlib.util
import json
import sys
from pathlib import Path

TEXTS = {
    "plain": ["a red bus", "The QUICK brown fox, 2021!", "it's I'll don't we've I'm they're he'd", ""],
    "curly quotes": ["“a cat” on the dog’s ‘mat’", "a ‟low‟ «guillemet»", "rock ’n’ roll"],
    "entities": [
        "salt &amp; pepper &lt;b&gt; &quot;x&quot;",
        "caf&eacute; &#39;n&#39; bar",
        "&#x1F600; &nbsp; &bogus;",
    ],
    "entities, twice": ["fish &amp;amp; chips", "&amp;lt;br&amp;gt;", "&amp;#39;s"],
    "full-width": ["ａ ＲＥＤ ｂｕｓ １２３", "ｗｏｗ！　ｙｅｓ？"],
    "ligatures": ["ﬁne ﬂowers and ﬀ ﬃ ﬄ", "œuvre æon ĳs"],
    "wrong encoding": ["cafÃ© â€œquotedâ€\x9d", "donâ€™t", "schÃ¶n"],
    "whitespace": ["  a\tred\n\nbus\r\n ", "a\u00a0red\u2003bus", "a\u200bred\ufeffbus", "a\u2028b\u2029c"],
    "accents": ["cafe\u0301 nai\u0308ve", "ÉCOLE Ñandú Ås", "İstanbul ΣΊΣΥΦΟΣ STRASSE straße"],
    "scripts": ["кот и пёс", "東京の夜", "고양이", "قطة", "חתול"],
    "digits": ["1000 m² ½ ³ Ⅷ ①", "3.14159 -5 +7", "٣ ४"],
    "emoji": ["🐈🎨", "👩\u200d🚀 🏳️\u200d🌈", "♥ ★ ✓ ☂"],
    "control characters": ["a\x00b\x07c", "\x1b[31mred\x1b[0m"],
    "case and marks": ["<b> cafe&#x301;", "I\u0327stanbul \u0130\u0327", "dog'\u017f", "c\u0345at"],
    "punctuation": ["(a) [b] {c} <d> a/b\\c a_b a-b #tag @you 50% $5 ^ ~ ` |", "...wait—what…"],
}


def main(folder: Path) -> None:
    """Writes the file beside this one."""
    spec = importlib.util.spec_from_file_location("openai_tokenizer", folder / "open_clip" / "tokenizer.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer = module.SimpleTokenizer(clean="lower")
    rows = {kind: [[text, tokenizer.encode(text)] for text in texts] for kind, texts in TEXTS.items()}
    used = {token for found in rows.values() for _, ids in found for token in ids}
    needed: dict[str, tuple[str, str]] = {}
    by_result = {"".join(pair): pair for pair in tokenizer.bpe_ranks}

    def need(token: str) -> None:
        if token in by_result and token not in needed:
            needed[token] = by_result[token]
            for part in by_result[token]:
                need(part)

    for token in used:
        need(tokenizer.decoder[token])
    merges = sorted(needed.values(), key=tokenizer.bpe_ranks.__getitem__)
    ids = [tokenizer.encoder["".join(pair)] for pair in merges]
    tree = {"merges": [" ".join(pair) for pair in merges], "merged_ids": ids, "texts": rows}
    text = json.dumps(tree, ensure_ascii=True, separators=(",", ":"))
    Path(__file__).with_name("openai_clip_ids.json").write_text(text.replace('],"', '],\n"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
