"""Names for array shapes: y, x are grid cells, c = 2 velocity components, m observed positions."""

from jax import Array
from jaxtyping import Bool, Float, Int, PRNGKeyArray

Field = Float[Array, "y x c"]  # standardised velocity; zero on land and in the padding but for imported networks
Cells = Bool[Array, "y x"]
Scalar = Float[Array, ""]
Level = Float[Array, ""]  # noise level sigma or what belongs to one, such as alpha_bar
Values = Float[Array, "m c"]
Key = PRNGKeyArray  # one typed key

__all__ = ["Array", "Bool", "Cells", "Field", "Float", "Int", "Key", "Level", "Scalar", "Values"]
