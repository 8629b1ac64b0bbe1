"""autocast: any function with its products in a low dtype and its delicate parts in float32."""
