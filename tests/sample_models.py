"""Random models whose choices are clear, and a tokenizer of many scripts, for the tests of decoding."""

import torch

from llmbook.architecture import Decoder, DecoderSettings
from llmbook.core import set_seed
from llmbook.tokenization import train_tokenizer

TEXT = ["Return the sum of a list of numbers 🙂.", "Open a file and read naïve lines: “quoted”.", "日本語のテキスト。"]


def build_decoder(vocabulary: int, seed: int = 1, sharpness: float = 8, **changes) -> Decoder:
    """A random decoder, its weights so large that the likeliest token stands out."""
    set_seed(seed)
    shape = {"depth": 2, "width": 32, "heads": 4, "key_value_heads": 2, "hidden": 64, "context": 96}
    decoder = Decoder(DecoderSettings(vocabulary, **shape | changes)).eval()
    with torch.no_grad():
        for weight in decoder.parameters():
            if weight.ndim == 2:
                weight.mul_(sharpness)
    return decoder


def build_tokenizer(size: int = 320):
    """Whole words of three languages, a symbol of four bytes, quotation marks."""
    return train_tokenizer(TEXT * 3, size)
