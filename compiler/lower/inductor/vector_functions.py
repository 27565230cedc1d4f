"""Functions of vectors of floats in inductor's C++, in the place of Sleef's.

Sleef's tanh is exact to half a unit in the last place (ULP), and took up to a fifth of a small network's graphs. This
one is exact to one and a half ULP, and takes half of that. Vectors of other types keep theirs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest import mock

from torch._inductor.codegen.cpp import CppVecOverrides

# The polynomial is that of tanhf in Cephes (S. L. Moshier, 1992). Below 0.625 the other formula would cancel.
_TANH = """[](auto x) {{
    using V = decltype(x);
    if constexpr (!std::is_same_v<V, at::vec::Vectorized<float>>) {{
        return x.tanh();
    }} else {{
        auto z = x * x, a = x.abs();
        auto small = V(-5.70498872745e-3f);
        small = small * z + V(2.06390887954e-2f);
        small = small * z + V(-5.37397155531e-2f);
        small = small * z + V(1.33314422036e-1f);
        small = small * z + V(-3.33332819422e-1f);
        small = V::blendv(small * z * x + x, x, z == V(0.0f));  // -0 stays -0
        auto large = V(1.0f) - V(2.0f) / ((a + a).exp() + V(1.0f));
        large = V::blendv(large, large.neg(), x < V(0.0f));
        return V::blendv(large, small, a < V(0.625f));
    }}
}}({x})"""


def tanh(x: object) -> str:
    """The C++ of it, for a variable; inductor takes the function for numbers by this one's name."""
    return _TANH.format(x=x)


def vector_functions() -> AbstractContextManager[object]:
    """A context in which inductor writes them."""
    return mock.patch.object(CppVecOverrides, tanh.__name__, staticmethod(tanh))
