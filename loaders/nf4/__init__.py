"""bitsandbytes' 4-bit types, as it computes and stores them: NF4 and FP4."""
