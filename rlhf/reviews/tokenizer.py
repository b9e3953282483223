"""One token a word: the reviews task's tokenizer, and the configuration of its small language models."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, PreTrainedTokenizerFast

from rlhf.reviews.grammar import vocabulary

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer: `<bos>` before a text unless add_special_tokens=False, `<unk>` for a foreign word.

    Decoding joins the words with single blanks, so that decode(encode(text)) is the text.
    """
    ids = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *vocabulary()))}
    backend = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])])
    pad, bos, eos, unk = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def tiny_llama_config(
    *, hidden_size: int = 96, num_layers: int = 2, num_heads: int = 4, intermediate_size: int = 256
) -> LlamaConfig:
    """A Llama of 239,712 parameters at the default sizes and this vocabulary; it reads at most 64 tokens."""
    tokenizer = make_tokenizer()
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=64,
        initializer_range=0.05,  # the usual 0.02 is for wider models, and learns slowly here
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
