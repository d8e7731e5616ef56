"""The algorithm: presets, region masks, the NFT objective, advantages, old-policy and EMA updates."""
