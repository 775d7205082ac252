"""Operations on pixels in three forms that agree to the last bit: PIL (the reference), torch, and Triton kernels."""
