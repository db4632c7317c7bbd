"""The same work in other libraries, in turns, on the same cores: `flaxmodels bench peers`."""
