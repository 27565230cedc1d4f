"""What executes Programs: the engine, its stores of states, and the bridge to torch.autograd."""

if __name__ != "metaoptim.runtime":
    raise ImportError(f"import metaoptim.runtime, not the bare package {__name__!r}")
