"""From losses to update coefficients: scalars only."""
