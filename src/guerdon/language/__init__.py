"""Language policies: models, templates and masks, groups, packing, log-probs and sampling."""
