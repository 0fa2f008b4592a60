"""mdltool: multi-domain action recognition with one backbone and small adapters per video domain."""

__version__ = "0.1.0"
