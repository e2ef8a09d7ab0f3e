"""How drivers, torch, the kernel and schedulers say that memory was missing: one list for who retries and who counts."""

SIGNS = (
    "out of memory",
    "outofmemory",
    "out_of_memory",
    "cannot allocate memory",
    "can't allocate memory",
    "cublas_status_alloc_failed",
)
"""In lower case."""


def says_out_of_memory(text: str) -> bool:
    """Whether an error's words mean that."""
    lower = text.lower()
    return any(sign in lower for sign in SIGNS)
