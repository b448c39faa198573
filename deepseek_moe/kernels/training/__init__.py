"""The kernels of fine-tuning: between the products of experts, 4-bit weights, and AdamW."""
