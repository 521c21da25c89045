import numpy as np

def build_sample_index(
    sizes: np.ndarray,
    document_index: np.ndarray,
    *,
    sequence_length: int,
    num_tokens: int,
    drop_last_partial: bool = True,
    wide: bool = False,
) -> np.ndarray: ...
