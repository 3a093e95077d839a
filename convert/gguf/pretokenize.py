"""How text is cut into words before byte-pair merging, by the names of ``tokenizer.ggml.pre``.

The expressions are those of the models' own ``tokenizer.json`` files (Oniguruma syntax), under the
names that llama.cpp gives them in ``llama-vocab.cpp``. Each cuts what the ones before it left; a
match is a word, and so is what lies between matches. Other scripts are escaped: tools alter them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tokenizers import Regex, normalizers, pre_tokenizers

from rl_mlx.errors import UnsupportedModel


@dataclass(frozen=True)
class PreTokenizer:
    """What one name of ``tokenizer.ggml.pre`` means.

    ``nfc``: text is composed first (Unicode NFC). ``spaces``: pieces are plain text with U+2581 for
    a space, as SentencePiece writes them, not the byte alphabet of GPT-2. ``whole_words``: a word
    that is a token is taken as it is, merges or not. ``bos``: a BOS goes first where the file does
    not say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    spaces: bool = False
    whole_words: bool = False
    bos: bool = False

    def splitter(self) -> pre_tokenizers.PreTokenizer:
        """The cutting as a ``tokenizers`` object."""
        steps: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns
        ]
        if not self.spaces:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        return pre_tokenizers.Sequence(steps)

    def normalizer(self) -> normalizers.Normalizer | None:
        """What is done to the text before it is cut."""
        if self.spaces:
            return normalizers.Replace(" ", "▁")
        return normalizers.NFC() if self.nfc else None


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HEAD = r"[^\r\n\p{L}\p{N}]?"
_CASED = rf"{_HEAD}{_UPPER}*{_LOWER}+|{_HEAD}{_UPPER}+{_LOWER}*"
_CASED_CONTRACTION = (
    rf"{_HEAD}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_HEAD}{_UPPER}+{_LOWER}*{_CONTRACTION}?"
)
_CASED_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_ASCII_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_HAN_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_HAN_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_THOUSANDS = r"(?<!\p{N})\p{N}{1,2}(?=(?:\p{N}{3})+(?!\p{N}))|\p{N}{1,3}"  # counted once a run
_LINES = r"[^\n]+|[\n]+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACE}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACE}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACE}"
)
_GPT4O = rf"{_CASED_CONTRACTION}|\p{{N}}{{1,3}}|{_CASED_SYMBOLS}|{_SPACE}"
_TEKKEN = rf"{_CASED}|\p{{N}}|{_CASED_SYMBOLS}|{_SPACE}"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    _HAN_KANA,
    rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACE}",
)
_SPARK = (
    *_DEEPSEEK3[:2],
    rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+",
    r"\p{N}",
)
_AFMOE = (
    _THOUSANDS,
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf"
    "\u0e00-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f"
    "\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+",
    _DEEPSEEK3[2],
)
# Letters with case, as the first DeepSeek tokenizers list them.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_CASED_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _HAN_HANGUL,
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_HANGUL, r"\p{N}")
_CHAMELEON = (
    r"<sentinel:[0-9]+>",
    r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
    r"([\t\n]|    |  )",
    r"\p{N}",
    r"[\p{P}!-/:-@\[-`{-~]",
    _GPT2,
)
_NOT_HAN = "&&[^\\p{Han}]]"
_KIMI_UPPER = rf"{_UPPER[:-1]}{_NOT_HAN}"
_KIMI_LOWER = rf"{_LOWER[:-1]}{_NOT_HAN}"
_KIMI = (
    rf"\p{{Han}}+|{_HEAD}{_KIMI_UPPER}*{_KIMI_LOWER}+{_CONTRACTION}?"
    rf"|{_HEAD}{_KIMI_UPPER}+{_KIMI_LOWER}*{_CONTRACTION}?|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACE}"
)
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SEED = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACE}"
_EXAONE_MOE = (
    rf"{_CONTRACTION}|{_HEAD}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_JAIS2_SPACE = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))
_JAIS2 = (
    rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|\s*[\r\n]+"
    rf"|{_JAIS2_SPACE}|\s{{1,2}}(?!\S)|\s{{1}}"
)
_YOUTU = (
    "[\uac00-\ud7a3\u3131-\u318e]+"
    "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    f"|[\u3105-\u312f]+|{_HAN_KANA}",
    rf"{_CASED_CONTRACTION}|\p{{N}}|{_CASED_SYMBOLS}|{_SPACE}",
)
_MINICPM5 = (r"\p{N}{1,3}", rf"{_CONTRACTION}|{_WORD}|\p{{N}}+|{_SYMBOLS}|{_SPACE}")
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

_gpt2 = PreTokenizer((_GPT2,))
_digits = PreTokenizer((r"\p{N}", _GPT2))
_llama3 = PreTokenizer((_LLAMA3,))
_qwen2 = PreTokenizer((_QWEN2,))
_gpt4o = PreTokenizer((_GPT4O,))
_deepseek3 = PreTokenizer(_DEEPSEEK3)
_bailing = PreTokenizer((_BAILING,))
_bloom = PreTokenizer((_BLOOM,))
_aya = PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O))
_lines = PreTokenizer((_LINES,), spaces=True)

_GROUPS: list[tuple[str, PreTokenizer]] = [
    ("default", PreTokenizer(_DEFAULT)),
    (
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        replace(_llama3, whole_words=True, bos=True),
    ),
    ("dbrx smaug-bpe glm4 chatglm-bpe", _llama3),
    ("jais-2", PreTokenizer((_JAIS2,))),
    (
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert"
        " jina-v1-en jina-v2-code roberta-bpe jais exaone4 trillion granite-docling",
        _gpt2,
    ),
    ("mpt olmo", replace(_gpt2, nfc=True)),
    ("starcoder refact smollm codeshell exaone minerva-7b mellum2", _digits),
    ("command-r", replace(_digits, nfc=True)),
    ("qwen2", replace(_qwen2, nfc=True)),
    ("deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", _qwen2),
    ("qwen35", PreTokenizer((_QWEN35,), nfc=True)),
    ("ufakzeka", PreTokenizer((rf"{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACE}",))),
    ("laguna", PreTokenizer((_LINES, _QWEN2))),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", _gpt4o),
    ("granite-embed-multi-97m", replace(_gpt4o, whole_words=True)),
    ("tekken", PreTokenizer((_TEKKEN,), whole_words=True, bos=True)),
    ("tiny_aya cohere2moe", _aya),
    ("deepseek-llm", PreTokenizer(_DEEPSEEK_LLM)),
    ("deepseek-coder", PreTokenizer(_DEEPSEEK_CODER)),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", _deepseek3),
    ("spark2_5", PreTokenizer(_SPARK)),
    ("afmoe", PreTokenizer(_AFMOE)),
    ("youtu", PreTokenizer(_YOUTU, whole_words=True)),
    ("kimi-k2", PreTokenizer((_KIMI,))),
    ("bailingmoe bailingmoe2 llada-moe", _bailing),
    ("seed-coder", PreTokenizer((_SEED,))),
    ("exaone-moe", PreTokenizer((_EXAONE_MOE,))),
    ("minicpm5", PreTokenizer(_MINICPM5, whole_words=True)),
    ("superbpe", PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))"))),
    ("chameleon", PreTokenizer(_CHAMELEON, bos=True)),
    ("falcon", PreTokenizer(_FALCON)),
    ("poro-chat bloom gpt3-finnish", _bloom),
    ("viking", PreTokenizer((_BLOOM, r"\p{N}"))),
    ("gemma4 granite-embed-multi-311m", replace(_lines, whole_words=True, bos=True)),
    ("sarvam-moe", _lines),
]
PRE_TOKENIZERS = {name: pre for names, pre in _GROUPS for name in names.split()}
"""Every name that llama.cpp knows, but for ``whitespace``, which is no byte-pair merging."""


def pre_tokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer of a name. Raises ``UnsupportedModel`` for one that nobody has told us."""
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModel(
            f"pre-tokenizer {name!r} (tokenizer.ggml.pre) is not known; update rl-mlx, "
            "or use the model's safetensors folder, which brings its own tokenizer"
        )
    return PRE_TOKENIZERS[name]
