"""The backends of attention that run on the platform of the tests."""

import jax

import qpaged


def backends_here(query, view, metadata):
    """Return the names of the backends that take a call and run here."""
    return [
        backend.name
        for backend in qpaged.attention_backends(query, view, metadata)
        if backend.available and backend.platform in (None, jax.default_backend())
    ]


def is_here(name):
    """Return True if the backend of that name runs here."""
    backend = {backend.name: backend for backend in qpaged.attention_backends()}[name]
    return backend.available and backend.platform in (None, jax.default_backend())
