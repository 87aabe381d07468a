"""Clips of Drascula that a recognizer hears otherwise than they are written: the actors paraphrase.

The word error rate of Whisper-base, after its own English normalizer, is above 1/3 of the text. Found by
``python -m bench.study.recognize --misread``.
"""

MISREAD = frozenset(
    f"drascula_{name}"
    for name in """
b_003 b_009 b_011 b_013 bj_009 bj_013 bj_017 bj_024 bj_025 d_004 d_014 d_018 d_021 d_025 d_026 d_028 d_033 d_037
d_056 d_067 d_070 d_082 d_083 e_002 e_003 e_010 e_014 e_018 hero_002 hero_008 hero_015 hero_017 hero_019
hero_022 hero_028 hero_029 hero_032 hero_036 hero_037 hero_042 hero_044 hero_046 hero_048 hero_050 hero_055
hero_058 hero_101 hero_109 hero_110 hero_122 hero_126 hero_136 hero_138 hero_142 hero_144 hero_147 hero_149
hero_154 hero_156 hero_161 hero_169 hero_171 hero_174 hero_178 hero_179 hero_182 hero_184 hero_185 hero_192
hero_202 hero_204 hero_205 hero_207 hero_211 hero_213 hero_215 hero_216 hero_221 hero_222 hero_225 hero_228
hero_235 hero_236 hero_245 hero_249 hero_254 hero_255 hero_256 hero_257 hero_258 hero_259 hero_264 hero_268
hero_270 hero_278 hero_281 hero_282 hero_288 hero_290 hero_292 hero_294 hero_295 hero_296 hero_301 hero_306
hero_317 hero_322 hero_324 hero_325 hero_326 hero_333 hero_335 hero_336 hero_339 hero_340 hero_342 hero_343
hero_347 hero_353 hero_356 hero_362 hero_364 hero_367 hero_368 hero_369 hero_370 hero_372 hero_373 hero_374
hero_377 hero_379 hero_381 hero_386 hero_387 hero_396 hero_397 hero_398 hero_401 hero_407 hero_410 hero_411
hero_420 hero_425 hero_430 hero_437 hero_447 hero_448 hero_452 hero_454 hero_461 hero_466 hero_472 hero_487
hero_490 hero_497 hero_499 i_001 i_002 i_004 i_005 i_006 i_008 i_009 i_014 i_016 i_017 i_019 i_020 i_023 i_028
i_032 l_002 l_004 l_007 l_011 l_012 l_013 l_020 l_027 l_029 p_006 p_008 p_014 p_016 t_001 t_003 t_004 t_009
t_011 t_012 t_015 t_016 t_020 vb_001 vb_002 vb_007 vb_017 vb_027 vb_030 vb_037 vb_039 vb_043 vb_047 vb_049
vb_057
""".split()  # noqa: SIM905
)
