"""One MeZO step on one rank: state, step and what goes between engine and step."""
