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
def build_blend_index(weights: list[float], limits: list[int], num_samples: int) -> tuple[np.ndarray, np.ndarray]: ...
def read_span(
    tokens: np.ndarray,
    pointers: np.ndarray,
    lengths: np.ndarray,
    sequences: np.ndarray,
    offset: int,
    stop: int,
    size: int,
) -> tuple[np.ndarray, int, np.ndarray]: ...
def number_documents(starts: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]: ...
def build_packing_plan(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]: ...
def build_pair_index(
    lengths: np.ndarray,
    documents: np.ndarray,
    *,
    first: int,
    last: int,
    max_tokens: int,
    short_probability: float,
    key: int,
) -> np.ndarray: ...
