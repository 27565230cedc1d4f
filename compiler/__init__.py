"""Programs as data: recording user code, the IR, and its derivatives; no tensor is computed here."""

if __name__ != "metaoptim.compiler":
    raise ImportError(f"import metaoptim.compiler, not the bare package {__name__!r}")
