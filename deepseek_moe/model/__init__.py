"""The model as transformers knows it: what an exported checkpoint carries along."""
