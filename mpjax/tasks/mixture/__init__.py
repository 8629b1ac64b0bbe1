"""Several tasks over one model: their losses, their gradients and what each pulls."""
