"""4-bit NormalFloat with double quantisation, as bitsandbytes computes and stores it."""
