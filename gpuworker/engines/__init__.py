"""The engines that slots run: `base` defines what an engine is, `catalog` finds them, the others implement one each."""
