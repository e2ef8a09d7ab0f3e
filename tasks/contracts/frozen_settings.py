"""What all settings are: frozen, documented, and strict about names."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of all settings: frozen, and an unknown name is an error rather than ignored.

    Errors do not quote what was given: it may be a secret in the wrong place. ``overrides.py`` quotes what is harmless.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)
