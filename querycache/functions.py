"""SQL functions whose answer follows from their arguments and the tables they are applied to; and tables that are none.

An answer that calls any other function may change without a write (``now()``, ``random()``, a function of the
application's own that reads further tables). Such a statement is only cached where it has a time to live, or
where the function was declared with ``QueryCache.depends``.
"""

from __future__ import annotations

import re

__all__ = ["is_stable", "is_system_table"]


def _names(lines: str) -> frozenset[str]:
    return frozenset(lines.split())


_EVERYWHERE = _names(
    """
    abs acos asin atan atan2 avg cast ceil ceiling char_length coalesce cos count cume_dist degrees
    dense_rank exp first_value floor format json_object lag last_value lead length ln log log10 lower
    ltrim max min mod nth_value ntile nullif percent_rank pow power radians rank replace round row_number
    rtrim sign sin sqrt substr substring sum tan trim upper
    """
)
_ONLY_IN = {
    "postgresql": _names(
        """
        aggregate_strings array_agg array_append array_cat array_length array_position
        array_prepend array_remove array_to_json array_to_string ascii bit_and bit_length bit_or
        bool_and bool_or btrim cardinality character_length chr concat concat_ws corr covar_pop
        covar_samp date date_part date_trunc div encode every extract generate_series greatest
        grouping initcap json_agg json_array_elements json_array_length json_build_array
        json_build_object json_each json_extract_path json_extract_path_text json_object_agg
        jsonb_agg jsonb_array_elements jsonb_array_elements_text jsonb_array_length
        jsonb_build_array jsonb_build_object jsonb_each jsonb_each_text jsonb_extract_path
        jsonb_extract_path_text jsonb_object_agg jsonb_object_keys jsonb_path_exists
        jsonb_path_query jsonb_path_query_array jsonb_set jsonb_typeof least left lpad make_date
        make_interval md5 mode octet_length overlay percentile_cont percentile_disc plainto_tsquery
        position range_merge regexp_match regexp_matches regexp_replace regexp_split_to_array
        regexp_split_to_table regr_slope repeat reverse right row_to_json rpad split_part
        starts_with stddev stddev_pop stddev_samp string_agg string_to_array strpos to_char to_date
        to_json to_jsonb to_number to_timestamp to_tsquery to_tsvector translate trunc ts_headline
        ts_rank ts_rank_cd unnest var_pop var_samp variance websearch_to_tsquery width_bucket
        """
    ),
    "mysql": _names(
        """
        aggregate_strings ascii bit_and bit_count bit_length bit_or char character_length concat
        concat_ws date date_add date_format date_sub datediff day dayname dayofmonth dayofweek
        dayofyear elt extract field find_in_set greatest group_concat hex hour if ifnull instr
        isnull json_array json_arrayagg json_contains json_extract json_length json_objectagg
        json_quote json_set json_type json_unquote json_valid json_value last_day lcase least left
        locate log2 lpad match match_against md5 mid minute month monthname octet_length position
        quarter quote regexp_replace repeat reverse right rpad second sha1 sha2 soundex std stddev
        stddev_pop stddev_samp substring_index time_format timestampdiff to_days truncate ucase
        unhex var_pop var_samp variance week weekday weekofyear year yearweek
        """
    ),
    "sqlite": _names(
        """
        aggregate_strings char group_concat hex ifnull iif instr json_array json_array_length
        json_each json_extract json_group_array json_group_object json_quote json_set json_type
        json_valid log2 printf quote total trunc typeof unicode
        """
    ),
}
_ONLY_IN["mariadb"] = _ONLY_IN["mysql"]


def is_stable(name: str, dialect: str) -> bool:
    """True if a function gives the same for the same rows, and is the database's own.

    A name that a database does not know can only be of a function of the application's, which may read whatever it
    likes. Known is what all its versions know that are maintained (of MySQL and MariaDB, what both do), or what
    SQLAlchemy renders as something that they know.

    ``date``, ``julianday``, ``strftime`` and their like are not stable: SQLite's take the text ``'now'``.

    Args:
        name: in lower case, unless it was quoted and is not.
        dialect: SQLAlchemy's name of the dialect.
    """
    bare = name.removeprefix("pg_catalog.")
    return bare in _EVERYWHERE or bare in _ONLY_IN.get(dialect, ())


_SYSTEM_SCHEMAS = frozenset({"information_schema", "mysql", "performance_schema", "pg_catalog", "sys"})
# Where a schema is said, it is the application's own on PostgreSQL; SQLite has them in each.
_SYSTEM_NAMES = {
    "postgresql": re.compile(
        r"pg_(aggregate|am|attribute|auth_members|authid|backend_memory_contexts|cast|class|collation|config|constraint"
        r"|conversion|cursors|database|db_role_setting|depend|description|enum|extension|group|index|indexes|inherits|language"
        r"|largeobject|largeobject_metadata|locks|matviews|namespace|opclass|operator|opfamily|parameter_acl|partitioned_table"
        r"|policies|policy|prepared_statements|prepared_xacts|proc|range|rewrite|roles|rules|sequence|sequences|settings|shadow"
        r"|tables|tablespace|transform|trigger|type|user|views|wait_events|(am|attr|available|default|event|file|foreign|hba"
        r"|ident|init|publication|replication|sec|shde|shmem|shsec|stat|statio|stats|subscription|timezone|ts|user_map)\w*)"
    ),
    "sqlite": re.compile(r"(sqlite|pragma)_.*|dbstat"),
}


def is_system_table(schema: str | None, name: str, dialect: str, mapped: bool) -> bool:
    """True for a table or view that the database itself writes, so that nobody can follow what changes in it.

    Args:
        mapped: whether the application has mapped a table of this name, which may then be its own.
    """
    if schema is not None and dialect != "sqlite":
        return schema.lower() in _SYSTEM_SCHEMAS
    if dialect == "postgresql" and name.lower().startswith("pg_") and not mapped:
        return True
    pattern = _SYSTEM_NAMES.get(dialect)
    return pattern is not None and pattern.fullmatch(name.lower()) is not None
