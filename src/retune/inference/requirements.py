"""The packages that a model version needs where it is served. Light imports only."""

from importlib.metadata import version

__all__ = ["PACKAGES", "requirements"]

PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub"),
    *("pandas", "numpy", "scikit-learn", "pydantic", "pyyaml", "mlflow"),
)
"""What `retune.inference` imports, and mlflow, which loads it."""


def requirements() -> list[str]:
    """`name==version` of each package as installed here.

    A local build suffix (torch's `+cpu`) is left out: package indexes do not know it, and which build to install is the server's choice.
    """
    return [f"{name}=={version(name).partition('+')[0]}" for name in PACKAGES]
