"""The state of optimizers stored in fewer bits; the update itself runs in float32."""
