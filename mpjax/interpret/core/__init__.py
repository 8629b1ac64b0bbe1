"""What every transform stands on: tracing, one walk over a jaxpr, where an equation stands."""
