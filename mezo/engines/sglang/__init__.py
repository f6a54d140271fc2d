"""MeZO inside SGLang: plugin, worker, slots, scoring. The only package that imports SGLang."""
