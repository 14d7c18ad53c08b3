"""SQL functions whose answer follows from their arguments and the tables they are applied to.

An answer that calls any other function may change without a write (``now()``, ``random()``, a function of the
application's own that reads further tables). Such a statement is only cached where it has a time to live, or
where the function was declared with ``QueryCache.depends``.
"""

from __future__ import annotations

__all__ = ["is_stable"]

_STABLE = frozenset(
    """
    abs acos any_value array_agg array_append array_cat array_length array_position array_prepend array_remove
    array_to_string ascii asin atan atan2 avg bit_and bit_length bit_or bool_and bool_or btrim cast ceil ceiling
    char_length character_length char chr coalesce concat concat_ws corr cos count covar_pop covar_samp cume_dist
    cardinality date_add date_format date_part date_sub date_trunc datediff day dayofmonth dayofweek dayofyear
    degrees dense_rank div encode every exp extract field find_in_set first_value floor format greatest group_concat
    grouping hex hour if ifnull instr isnull json_agg json_array json_array_elements json_array_length json_build_array
    json_build_object json_contains json_each json_extract json_extract_path json_extract_path_text json_group_array
    json_group_object json_length json_object json_object_agg json_query json_quote json_set json_type json_unquote
    json_valid json_value jsonb_agg jsonb_array_elements jsonb_array_elements_text jsonb_array_length
    jsonb_build_array jsonb_build_object jsonb_each jsonb_each_text jsonb_extract_path jsonb_extract_path_text
    jsonb_object_agg jsonb_object_keys jsonb_set jsonb_typeof lag last_value lcase lead least left length
    listagg ln locate log log10 log2 lower lpad ltrim make_date make_interval max md5 median mid min minute mod mode
    month monthname nth_value ntile nullif octet_length overlay percent_rank percentile_cont percentile_disc
    plainto_tsquery position pow power printf quarter quote radians range_merge rank regexp_matches regexp_replace
    regexp_split_to_array regexp_split_to_table regr_slope repeat replace reverse right round row_number row_to_json rpad
    rtrim second sha1 sha2 sign sin soundex split_part sqrt starts_with stddev stddev_pop stddev_samp str
    string_agg string_to_array strpos substr substring substring_index sum tan time_format to_char to_date
    to_json to_jsonb to_number to_timestamp to_tsquery to_tsvector total translate trim trunc truncate ts_headline
    ts_rank ts_rank_cd typeof ucase unhex unicode unistr unnest upper var_pop var_samp variance week weekday
    weekofyear width_bucket year yearweek
    """.split()
)


def is_stable(name: str) -> bool:
    """True if a function of this name (in lower case) gives the same for the same rows, on every database.

    ``date``, ``julianday``, ``strftime`` and their like are not: SQLite's take the text ``'now'``.
    """
    return name in _STABLE
