"""Phi-3 from scratch: a decoder, its weights, its tokenizer and generation. Knows nothing of LoRA."""

from minilora.phi3.config import Phi3Config
from minilora.phi3.generation import Sampling, generate, generate_batch, stream
from minilora.phi3.hub import CHECKPOINT_FILES, TEXT_FILES, fetch
from minilora.phi3.model import Phi3ForCausalLM
from minilora.phi3.quantization import dequantize, is_4_bit, quantized_weights
from minilora.phi3.tokenizer import Tokenizer, copy_tokenizer, load_tokenizer
from minilora.phi3.weights import Checkpoint, load, save

__all__ = [
    "CHECKPOINT_FILES",
    "TEXT_FILES",
    "Checkpoint",
    "Phi3Config",
    "Phi3ForCausalLM",
    "Sampling",
    "Tokenizer",
    "copy_tokenizer",
    "dequantize",
    "fetch",
    "generate",
    "generate_batch",
    "is_4_bit",
    "load",
    "load_tokenizer",
    "quantized_weights",
    "save",
    "stream",
]
