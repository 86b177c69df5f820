"""The LoRA library: layers, how they get into a model, and the files of adapters.

Works on any nn.Module, and knows nothing of Phi-3 or of training.
"""
