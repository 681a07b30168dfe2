"""From gates to an ordinary smaller model, and what has to become smaller beside it."""
